"""D under a model, taken apart: the coefficients of each part of a loss over the whole of D, however it is cut.

Parts are sides, thirds by the loss's own weight, and thirds within a side. Few of them have to be measured: parts are
sums of tokens, so the others are sums and differences of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from fused_po.diagnostics.examples import Examples, Joined, StatsOf, joined
from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import Batch, Loss, meant, per_token
from fused_po.ops.batches import Layout, call_batch, masked_stats
from fused_po.ops.coefficients import coefficients, sided_coefficients
from fused_po.ops.planning import make_plan
from fused_po.splits import Split, tertiles
from fused_po.stats import Stats

__all__ = ["ALL_PARTS", "FLAT", "PARTS", "THIRDS", "Taken", "independent", "require_parts", "take_apart"]

SIDES = {"positive": 1, "negative": -1}
THIRDS = ("top", "middle", "bottom")
PARTS = ("whole", *SIDES, "rest", *THIRDS, *(f"{side}/{third}" for side in SIDES for third in THIRDS))
FLAT = "/no_reweighting"
ALL_PARTS = (*PARTS, *(part + FLAT for part in PARTS))


@dataclass(frozen=True)
class Taken:
    """D at the model's parameters, packed: N rows that carry loss.

    Attributes:
        layout: where the rows lie.
        stats: what the loss reads of them, (N,) each.
        batch: what else it reads.
        role: (N,), the side of each row.
        parts: the coefficients of each part that was asked for, (N,).
        thirds: the tokens of each third and of each third of a side, (N,) bool.
        joined: the batches that D came in.
    """

    layout: Layout
    stats: Stats
    batch: Batch
    role: Tensor
    parts: Mapping[str, Coefficients]
    thirds: Mapping[str, Tensor]
    joined: Joined

    def is_zero(self, part: str) -> bool:
        """Whether no token has a coefficient in it."""
        return not any(bool(c.any()) for c in self.parts[part] if c is not None)

    def weighted(self, index: int, given: Stats, part: str) -> Tensor:
        """The part's coefficients times statistics of one batch, in the shape of its labels, summed, (), float64: over
        all batches, this has the gradient of the part.
        """
        total: Tensor | None = None
        for name, c in zip(("logp", "entropy", "lse"), self.parts[part], strict=True):
            if c is None:
                continue
            whole = c.new_zeros(self.joined.labels.numel(), dtype=torch.float64)
            self.layout.rows.scatter(whole, c.double())
            own = self.joined.part(index, whole.reshape(self.joined.labels.shape))
            # 0 times minus infinity is no number
            term = (own * torch.where(own != 0.0, getattr(given, name).double(), 0.0)).sum()
            total = term if total is None else total + term
        assert total is not None
        return total


@torch.no_grad()
def take_apart(
    model: nn.Module,
    batches: Sequence[Examples],
    loss: Loss,
    stats: StatsOf,
    also: Sequence[str] = (),
    parts: Sequence[str] = ALL_PARTS,
) -> Taken:
    """The coefficients of parts of a loss at the model's parameters, over all batches as one call: means, thirds and
    normalisers are those of the whole of D, and a loss that compares what is in a batch sees all of it.

    Thirds are of equal size by the loss's own weight: of the answers where the loss weighs answers, of the tokens
    where it weighs tokens. Equal weights have no order, and the order of D would sort them by side. They go in an order
    that is drawn once, pair by pair, so that the two answers of a pair, and the tokens of an answer, stay together.

    Args:
        also: further statistics.
        parts: names from ``ALL_PARTS``.

    Raises:
        ValueError: side inputs that are missing, of another shape or at odds with each other.
    """
    for examples in batches:
        loss.check(frozenset(examples.side_inputs))
    whole = joined(batches)
    layout = Layout.of(whole.labels, make_plan(whole.labels))
    outputs = tuple(dict.fromkeys((*loss.statistics, *also)))
    found = [stats(model, one.inputs, one.labels, outputs).present() for one in batches]
    table = {name: whole.join([one[name] for one in found]) for name in outputs}
    packed = Stats(**{name: layout.rows.gather(value.reshape(-1)) for name, value in table.items()})
    packed = masked_stats(packed, layout.mask)
    assert packed.logp is not None
    batch = call_batch(layout, whole.side_inputs, None, None, packed.logp.dtype)
    role = per_token(loss.role(batch), batch, "role", loss)
    own = _sides(loss, packed, batch, "identity")
    masks = _masks(loss, packed, batch, role, own)
    found_of: dict[str, Coefficients] = {}
    for suffix, reweight in (("", "identity"), (FLAT, "none")):
        wanted = [part for part in PARTS if part + suffix in parts]
        if wanted:
            sides = own if not suffix else _sides(loss, packed, batch, reweight)
            found_of |= {part + suffix: _part(part, sides, masks) for part in wanted}
    return Taken(layout, packed, batch, role, found_of, masks, whole)


def _sides(loss: Loss, stats: Stats, batch: Batch, reweight: str) -> dict[str, Coefficients]:
    """The whole, its sides and the rest, as the split tells them apart: in a loss of several parts a token may have
    two sides.
    """

    def under(positive: float, negative: float) -> Coefficients:
        return coefficients(loss, stats, batch, Split(positive, negative, reweight=reweight, population="batch"))[1]

    found = {"whole": under(1.0, 1.0), "rest": under(0.0, 0.0)}
    for name, gains in (("positive", (1.0, 0.0)), ("negative", (0.0, 1.0))):
        found[name] = Coefficients(_logp(under(*gains)) - _logp(found["rest"]))
    return found


def _part(part: str, sides: Mapping[str, Coefficients], masks: Mapping[str, Tensor]) -> Coefficients:
    if part in sides:
        return sides[part]
    side = part.partition("/")[0]
    c = _logp(sides[side]) if side in SIDES else _logp(sides["whole"]) - _logp(sides["rest"])
    return Coefficients(torch.where(masks[part], c, 0.0))


def _logp(found: Coefficients) -> Tensor:
    assert found.logp is not None
    return found.logp


def _masks(
    loss: Loss, stats: Stats, batch: Batch, role: Tensor, sides: Mapping[str, Coefficients]
) -> dict[str, Tensor]:
    """(N,) bool by third, the tokens of it."""
    weight = loss.weight(sided_coefficients(loss, stats, batch), batch)
    order = _tie_order(batch)
    if loss.weighs_sequences:
        weight = batch.mean_per_sequence(weight)
    else:
        # tokens in the order of their answers
        order = batch.spread(_inverse(order)).argsort(stable=True)
    back = _inverse(order)

    def thirds(own: Tensor) -> Tensor:
        """Of the tokens (N,) that a mask names, by index into ``THIRDS``; 3 for others."""
        members = batch.sum_per_sequence(own.double()) > 0 if loss.weighs_sequences else own
        # those outside make a group of their own
        found = tertiles(weight[order], (~members).long()[order])[back]
        found = batch.spread(found) if loss.weighs_sequences else found
        return torch.where(own, 2 - found, 3)

    groups = {"": role != 0}
    groups |= {f"{side}/": (role == sign) | (_logp(sides[side]) != 0) for side, sign in SIDES.items()}
    found = {prefix: thirds(own & batch.loss_tokens()) for prefix, own in groups.items()}
    return {prefix + third: one == index for prefix, one in found.items() for index, third in enumerate(THIRDS)}


def _tie_order(batch: Batch) -> Tensor:
    """The sequences (B,) in the order of equals: pairs in an order that is drawn, each in one piece."""
    count, device = batch.segments.shape[0], batch.segments.device
    halves = 2 if count % 2 == 0 else 1
    drawn = torch.randperm(count // halves, generator=torch.Generator().manual_seed(0)).to(device)
    return torch.stack([drawn + index * (count // halves) for index in range(halves)], 1).reshape(-1)


def _inverse(order: Tensor) -> Tensor:
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places


@cache
def independent(parts: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """The fewest parts that have to be measured for some to be known, and how: part -> measured part -> how often it
    counts. All of ``PARTS`` take nine.

    Args:
        parts: names from ``ALL_PARTS``.
    """
    columns = {part: _cells(part) for part in (*reversed(PARTS), *(one + FLAT for one in reversed(PARTS)))}
    columns = {part: cells for part, cells in columns.items() if part in parts}
    measured: list[str] = []
    for part in columns:
        table = torch.stack([columns[one] for one in (*measured, part)])
        if int(torch.linalg.matrix_rank(table)) > len(measured):
            measured.append(part)
    table = torch.stack([columns[one] for one in measured], 1)
    found = {}
    for part in parts:
        counts = torch.linalg.lstsq(table, columns[part].unsqueeze(1)).solution[:, 0].round().int().tolist()
        found[part] = {one: count for one, count in zip(measured, counts, strict=True) if count}
    return found


def _cells(part: str) -> Tensor:
    """Which tokens a part holds, by side, third within the side and third of all; the last cell is the rest. The same
    again with equal weights, but for the rest, which has none.
    """
    name, _, flat = part.partition("/no")
    grid = torch.zeros(2, 2, 3, 3, dtype=torch.float64)  # equal weights or not, side, third of the side, third of all
    kind, first, second = int(bool(flat)), *[*name.split("/"), ""][:2]
    for index, side in enumerate(SIDES):
        for within, third in enumerate(THIRDS):
            for among, other in enumerate(THIRDS):
                inside = first in ("whole", other) or (first == side and second in ("", third))
                grid[kind, index, within, among] = inside
    return torch.cat([grid.reshape(-1), grid.new_tensor([first in ("whole", "rest")])])


def require_parts(parts: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of ``ALL_PARTS``, or for none at all."""
    unknown = [part for part in parts if part not in ALL_PARTS]
    if unknown:
        known = ", ".join(PARTS)
        raise ValueError(f"G has no part {unknown[0]!r}{meant(unknown[:1], ALL_PARTS)}: it has {known}, {FLAT}")
    if not parts:
        raise ValueError("no part of G asked for")
