"""How much memory a call will take: from shapes alone, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from fused_po.ops.calls import DEFAULT_SCRATCH_BYTES, GIB
from fused_po.ops.gradients import Wanted, storage_dtype
from fused_po.ops.head import Head
from fused_po.ops.sweep import MAX_TILE_ROWS, Budget

__all__ = ["ROUTES", "MemoryPrediction", "largest_length", "predict_memory"]

ROUTES = ("linear_loss", "linear_token_stats", "full_logits")
# blocks of rows that the CPU kernels work on, and numbers of each token: statistics, coefficients, side inputs
KERNEL_BLOCKS, TOKEN_BYTES = {"cpu": 3 << 20}, 200
# no length beyond is asked for
MOST_TOKENS = 1 << 34


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes alive at the peak of a forward and backward, by what they hold.

    Attributes:
        inputs: hidden states, weight and labels, which the caller holds.
        gradients: of hidden states and weight, as they are returned.
        accumulator: dW in float32 where the weight is narrower, and dH in float32 for float16.
        scratch: tiles of logits and of their gradient, products on their way; what ``scratch_bytes`` bounds.
        logits: full logits, their softmax and gradients; of the route that has them.
        tokens: numbers per token.
    """

    inputs: int = 0
    gradients: int = 0
    accumulator: int = 0
    scratch: int = 0
    logits: int = 0
    tokens: int = 0

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    @property
    def above_inputs(self) -> int:
        """What ``peak_memory`` counts of the call."""
        return self.peak - self.inputs

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def predict_memory(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    route: str = "linear_loss",
    trainable: bool = True,
    entropy: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scratch_bytes: int | None = None,
) -> MemoryPrediction:
    """The peak of a forward and backward through the head, in bytes.

    From the same division of the budget that the operations make (``Budget``), and for full logits from what autograd
    keeps: the softmax in float32 from forward to backward, and there two gradients as large. Holds within 15 % and
    4 MiB of what ``peak_memory`` counts on a CPU; libraries' own workspaces are not in it.

    Args:
        tokens: N, all of which carry loss.
        hidden_size: H.
        vocab_size: V.
        route: ``linear_loss``, ``linear_token_stats`` or ``full_logits``: plain torch, softmax in float32.
        trainable: the head is trained; False: frozen, as under LoRA.
        entropy: the gradient also flows through the entropy.
        dtype: of hidden states and weight, float32, bfloat16 or float16.
        device: decides the default budget.
        scratch_bytes: as in ``linear_loss``; default 1 GiB on a GPU, 96 MiB on a CPU.

    Raises:
        ValueError: sizes below 1, or an unknown route.
    """
    if min(tokens, hidden_size, vocab_size) < 1:
        raise ValueError(f"tokens, hidden_size and vocab_size must be positive: got {tokens, hidden_size, vocab_size}")
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}: got {route!r}")
    narrow = dtype.itemsize
    rows, head_elements = tokens * hidden_size, vocab_size * hidden_size
    inputs = (rows + head_elements) * narrow + 8 * tokens
    d_hidden, d_weight = rows * narrow, head_elements * narrow if trainable else 0
    if route == "full_logits":
        return _full_logits(tokens * vocab_size, inputs, d_hidden + d_weight, narrow, entropy)
    kind = torch.device(device).type
    given = DEFAULT_SCRATCH_BYTES.get(kind, GIB) if scratch_bytes is None else scratch_bytes
    scratch = _scratch(tokens, hidden_size, vocab_size, given, trainable, entropy, dtype, route == "linear_loss", kind)
    wide_hidden = rows * storage_dtype(dtype).itemsize
    wide_weight = 4 * head_elements if trainable else 0
    copies = (wide_hidden if wide_hidden != d_hidden else 0) + (wide_weight if narrow < 4 else 0)
    numbers = TOKEN_BYTES * tokens
    if route == "linear_token_stats":
        # tiles wait for backward, and are there when gradients are rounded
        return MemoryPrediction(inputs, d_hidden + d_weight, copies, scratch, 0, numbers)
    # gradients are made in the forward, and rounded in the backward, when the tiles are gone
    rounded = (d_hidden if wide_hidden != d_hidden else 0) + (d_weight if narrow < 4 else 0)
    if rounded > scratch:
        return MemoryPrediction(inputs, d_hidden + d_weight, copies, 0, 0, numbers)
    return MemoryPrediction(inputs, d_hidden + d_weight - rounded, copies, scratch, 0, numbers)


def largest_length(memory: int, predict: Callable[[int], MemoryPrediction]) -> int:
    """The most tokens whose predicted peak is within ``memory`` bytes; 0 if not even one is.

    Args:
        predict: from tokens to the prediction, which must not fall as they grow.
    """
    low, high = 0, 1
    while high < MOST_TOKENS and predict(high).peak <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if predict(middle).peak <= memory else (low, middle)
    return low


def _full_logits(elements: int, inputs: int, gradients: int, narrow: int, entropy: bool) -> MemoryPrediction:
    """Logits in their dtype, float32 from the softmax on."""
    copy = narrow + 4 if narrow < 4 else 4
    forward = copy + 4
    # the softmax, the gradient that reaches it, and what it makes of that
    backward = 12
    if entropy:
        # the softmax's exponential and the product wait with it
        forward, backward = max(copy + 4, 12), 20
    last = elements * narrow + gradients
    peak = max(elements * forward, elements * backward, last)
    held = gradients if peak == last else 0
    return MemoryPrediction(inputs=inputs, gradients=held, logits=peak - held)


def _scratch(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    scratch_bytes: int,
    trainable: bool,
    entropy: bool,
    dtype: torch.dtype,
    whole_loss: bool,
    kind: str,
) -> int:
    """Tiles, and rows on their way through GEMM 2 and 3, of a call of so many tokens."""
    weight = torch.empty((vocab_size, hidden_size), dtype=dtype, device="meta")
    head = Head(weight, None, dtype, 1.0, None, 1.0, scratch_bytes // 8, None)
    wide, narrow = head.accumulation_dtype.itemsize, dtype.itemsize
    # linear_token_stats learns of a gradient through the entropy too late to keep logits
    unscaled = not entropy
    budget = Budget.of(scratch_bytes, head, unscaled=unscaled or not whole_loss, wanted=Wanted(True, trainable, False))
    flying = min(tokens, budget.tile)
    extra = 2 * hidden_size * (wide + narrow)
    flight = flying * (vocab_size * (wide if wide == narrow else wide + narrow) + extra) + KERNEL_BLOCKS.get(kind, 0)
    if not trainable and (unscaled or not whole_loss):
        held = min(tokens, MAX_TILE_ROWS) * 2 * hidden_size * wide
        # the products of linear_token_stats wait outside of the budget, as an output
        waits = tokens <= budget.whole if whole_loss else True
        home = tokens * hidden_size * (wide if whole_loss else storage_dtype(dtype).itemsize) if waits else 0
        return home + max(flight + _casts(head, flying, kind), held)
    kept = tokens if tokens <= budget.whole else (budget.whole if whole_loss else budget.kept)
    row = vocab_size * (narrow if unscaled or not whole_loss else wide)
    if entropy and not whole_loss:
        return kept * row + flight
    if wide == narrow and (kept == tokens or whole_loss):
        # the kept tile is the one in flight
        return kept * (row + extra) + KERNEL_BLOCKS.get(kind, 0)
    return kept * (row + extra) + flight


def _casts(head: Head, rows: int, kind: str) -> int:
    """Slices in float32 of half-precision operands, and of their product: CPUs have no product that widens."""
    if kind != "cpu" or head.compute_dtype == head.accumulation_dtype:
        return 0
    vocab, width = head.weight.shape
    step = min(vocab, max(1, head.slice_bytes // (4 * max(width, rows))))
    return 4 * step * (width + rows)
