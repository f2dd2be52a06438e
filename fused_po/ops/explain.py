"""What route a call takes, why, and what it costs on paper, in words."""

from __future__ import annotations

import torch

from fused_po.ops.checks import require_number
from fused_po.ops.costs import PRICES
from fused_po.ops.gradients import Wanted
from fused_po.ops.peaks import peak
from fused_po.ops.routes import Route
from fused_po.ops.sizes import Sizes, default_scratch
from fused_po.prices import DEVICES, Device

__all__ = ["explain", "usual_route"]


def explain(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    *,
    operation: str = "linear_loss",
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    trainable: bool = True,
    device: torch.device | str = "cuda",
    scratch_bytes: int | None = None,
) -> str:
    """The route of a call whose gradients come through log-probs, a line for each decision.

    Args:
        rows: N, tokens that carry loss; of none, a line says so.
        hidden_size: H.
        vocab_size: V.
        operation: ``linear_loss``, of a loss whose horizons fit a chunk, or ``linear_token_stats``.
        dtype: of products: that of autocast, or of the hidden states.
        weight_dtype: of the weight; default ``dtype``.
        trainable: the head is trained; False: frozen, as under LoRA.
        device: decides the default budget; a GPU's name, such as ``"h100"``, also whose prices the last lines take. The
            route itself is chosen by the prices of one device, so that it is the same on every machine.
        scratch_bytes: as in the operations; default 1 GiB on a GPU, 96 MiB on a CPU.

    Raises:
        ValueError: sizes below 1 or not whole, an unknown operation or device, no dtype of floats, or no budget.
    """
    for name, size in (("rows", rows), ("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        require_number(name, size, whole=True)
    if rows < 0 or min(hidden_size, vocab_size) < 1:
        raise ValueError(
            "hidden_size and vocab_size must be positive, and rows not negative: "
            f"got {hidden_size}, {vocab_size} and {rows}"
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point torch.dtype, such as torch.bfloat16: got {dtype!r}")
    if scratch_bytes is not None:
        require_number("scratch_bytes", scratch_bytes, whole=True)
        if scratch_bytes < 0:
            raise ValueError(f"scratch_bytes must not be negative: got {scratch_bytes}")
    if operation not in ("linear_loss", "linear_token_stats"):
        raise ValueError(f"operation must be linear_loss or linear_token_stats: got {operation!r}")
    fused = operation == "linear_loss"
    kind, prices = _device(device)
    if not rows:
        return "0 rows: no label carries loss, so the head is not run"
    stored = dtype if weight_dtype is None else weight_dtype
    route = usual_route(rows, hidden_size, vocab_size, fused, dtype, stored, trainable, kind, scratch_bytes)
    sizes, costs = route.sizes, route.seconds(rows, fused=fused, on=prices)
    total, products = sum(costs.values()), costs["the products"]
    most = peak(route, rows, fused=fused, plain=True, widens=kind == "cpu" and dtype.itemsize < 4)
    lines = [
        f"{rows} rows, H = {hidden_size}, V = {vocab_size}, products of {_name(dtype)}, weight in {_name(stored)}, "
        f"{'trained' if trainable else 'frozen'} head",
        f"budget: {_size(sizes.scratch)} of scratch" + _beside(sizes),
        *_decisions(route, rows, fused),
        f"at the peak: {_size(most.scratch)} of tiles, products and copies"
        + (f", {_size(most.accumulator)} of dW in a wider dtype" if most.accumulator else ""),
        f"on paper, {prices.name}: {_time(total)}, {total / products:.3f} times the products alone",
    ]
    return "\n".join([*lines, *(f"  {name}: {_time(seconds)}" for name, seconds in costs.items() if seconds)])


def usual_route(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    fused: bool,
    dtype: torch.dtype,
    stored: torch.dtype,
    trainable: bool,
    kind: str,
    scratch_bytes: int | None,
) -> Route:
    """Of a call whose gradients come through log-probs; ``kind``: the type of its device, which decides the budget."""
    scratch = default_scratch(kind) if scratch_bytes is None else scratch_bytes
    sizes = Sizes(hidden_size, vocab_size, dtype, stored, Wanted(True, trainable, False), scratch)
    return Route.of(sizes, rows, fused=fused, unscaled=fused)


def _device(given: torch.device | str) -> tuple[str, Device]:
    """The type of a device, and whose prices are its."""
    if isinstance(given, str) and given.lower() in DEVICES:
        return "cuda", DEVICES[given.lower()]
    try:
        return torch.device(given).type, PRICES
    except RuntimeError:
        raise ValueError(f"device must be one of torch's, or {', '.join(DEVICES)}: got {given!r}") from None


def _beside(sizes: Sizes) -> str:
    found = ""
    if sizes.accumulator:
        found += f", and the room of one dW in float32, {_size(sizes.accumulator)}"
    if sizes.copied:
        found += f", and a copy of the weight in {_name(sizes.compute)}, {_size(sizes.copied)}"
    return found


def _decisions(route: Route, rows: int, fused: bool) -> list[str]:
    sizes = route.sizes
    if route.eager:
        lines = [f"GEMM 2 runs in the forward, {route.tile} rows at a time; backward is a row scale: 2 products"]
        if fused and rows > route.whole:
            lines.append("the products of a horizon that is larger wait in dH, in its dtype")
        return lines
    if fused and route.several(rows):
        chunk = min(rows, route.chunk_rows(rows))
        count = -(-rows // chunk)
        tiles = "" if route.in_place else f", {route.tile} rows of logits at a time"
        return [f"{count} chunks of at most {chunk} rows, each of which adds to dW: 3 products{tiles}"]
    kept = route.keeps(rows, False)
    lines = []
    if kept:
        many = "all rows keep" if kept == rows else f"{kept} rows keep"
        tiles = "" if route.in_place else f", made from {route.tile} rows of logits at a time"
        lines.append(f"{many} their gradient tile from forward to backward{tiles}")
    if kept < rows:
        block, columns = route.shape(rows - kept)
        lines.append(
            f"the logits of {rows - kept} are made again in backward, in tiles of {block} rows and {columns} classes: "
            f"{3 + (rows - kept) / rows:.2f} products"
        )
    elif sizes.wanted.weight:
        lines.append("each element of dW is written once: 3 products, no accumulator")
    if fused and sizes.wanted.head:
        when = "wait for backward: the tiles are no larger than dW" if rows <= route.waiting else "run in the forward"
        lines.append(f"GEMM 2 and 3 {when}")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 28 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
