"""A batch under a model, taken apart: the coefficients of each part of a loss, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import Batch, Loss, listed, per_token
from fused_po.ops.batches import Layout, call_batch, masked_stats
from fused_po.ops.coefficients import coefficients
from fused_po.ops.output import THIRDS, parts_of
from fused_po.ops.planning import make_plan
from fused_po.splits import Split
from fused_po.stats import Stats

__all__ = [
    "FLAT",
    "PARTS",
    "Examples",
    "StatsOf",
    "Taken",
    "accumulators",
    "gradients",
    "norm",
    "require_examples",
    "require_loss_tokens",
    "take_apart",
]

PARTS = ("whole", "positive", "negative", "rest", "top", "middle", "bottom")
FLAT = "/no_reweighting"

StatsOf = Callable[[nn.Module, Mapping[str, Any], Tensor, Sequence[str]], Stats]


@dataclass(frozen=True, init=False)
class Examples:
    """A batch of examples: of D, on which a loss is taken, or of D', the responses of a final model.

    Attributes:
        inputs: what the model takes; (B, S) each for a causal language model.
        labels: (B, S - 1) for a causal language model: already shifted, -100 ignored. Pairs: first half chosen.
        side_inputs: what the loss reads, as in ``linear_loss``, in one mapping.

    Raises:
        TypeError: side inputs as keywords of their own.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    side_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self, inputs: Mapping[str, Any], labels: Tensor, side_inputs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        if others:
            shown = ", ".join(f'"{name}": ...' for name in others)
            raise TypeError(
                f"Examples takes side inputs in one mapping, Examples(inputs, labels, {{{shown}}}): "
                f"got {listed(others)} as keywords"
            )
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "side_inputs", {} if side_inputs is None else side_inputs)


@dataclass(frozen=True)
class Taken:
    """A batch at the model's parameters, packed: N rows that carry loss.

    Attributes:
        layout: where the rows lie.
        stats: what the loss reads of them, (N,) each.
        batch: what else it reads.
        role: (N,), the side of each row.
        parts: the coefficients of each part, ``PARTS`` and the same with ``FLAT`` behind.
    """

    layout: Layout
    stats: Stats
    batch: Batch
    role: Tensor
    parts: Mapping[str, Coefficients]

    def weighted(self, given: Stats, part: str) -> Tensor:
        """The part's coefficients times statistics in the shape of labels, (): what has the part's gradient."""
        total: Tensor | None = None
        for name, c in zip(("logp", "entropy", "lse"), self.parts[part], strict=True):
            if c is not None:
                values = self.layout.rows.gather(getattr(given, name).reshape(-1))
                term = (c.double() * values.double()).sum()
                total = term if total is None else total + term
        assert total is not None
        return total


@torch.no_grad()
def take_apart(model: nn.Module, examples: Examples, loss: Loss, stats: StatsOf, also: Sequence[str] = ()) -> Taken:
    """The coefficients of each part of a loss at the model's parameters; ``also`` names further statistics.

    Raises:
        ValueError: side inputs that are missing or of another shape.
    """
    loss.check(frozenset(examples.side_inputs))
    layout = Layout.of(examples.labels, make_plan(examples.labels))
    outputs = tuple(dict.fromkeys((*loss.statistics, *also)))
    given = stats(model, examples.inputs, examples.labels, outputs)
    packed = Stats(**{name: layout.rows.gather(v.reshape(-1)) for name, v in given.present().items()})
    packed = masked_stats(packed, layout.mask)
    assert packed.logp is not None
    batch = call_batch(layout, examples.side_inputs, None, None, packed.logp.dtype)
    thirds = parts_of(THIRDS, loss, packed, batch)
    found = _parts("", loss, packed, batch, thirds, "identity")
    found |= _parts(FLAT, loss, packed, batch, thirds, "none")
    return Taken(layout, packed, batch, per_token(loss.role(batch), batch, "role", loss), found)


def _parts(
    suffix: str, loss: Loss, stats: Stats, batch: Batch, thirds: Tensor, reweight: str
) -> dict[str, Coefficients]:
    def under(positive: float, negative: float) -> Coefficients:
        split = Split(positive, negative, reweight=reweight, population="batch")
        return coefficients(loss, stats, batch, split)[1]

    whole, rest = under(1.0, 1.0), under(0.0, 0.0)
    assert whole.logp is not None and rest.logp is not None
    sided = whole.logp - rest.logp
    found = {"whole": whole, "rest": rest}
    for name, split in (("positive", (1.0, 0.0)), ("negative", (0.0, 1.0))):
        c = under(*split).logp
        assert c is not None
        found[name] = Coefficients(c - rest.logp)
    for index, name in enumerate(THIRDS[:3]):
        found[name] = Coefficients(torch.where(thirds == index, sided, 0.0))
    return {f"{name}{suffix}": found[name] for name in PARTS}


def gradients(value: Tensor, parameters: Mapping[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    """Of a scalar in each parameter, 0 where it does not depend on one; ``keep`` keeps the graph."""
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=keep, allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


def accumulators(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros to add gradients to, in float32 at least: a half loses what is added to a large sum."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }


def require_examples(name: str, batches: object) -> None:
    """Raise ValueError for what is no sequence of ``Examples``."""
    if isinstance(batches, Examples):
        raise ValueError(f"{name} must be a list of Examples: got one Examples, write [examples]")
    # it is read more than once
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise ValueError(f"{name} must be a list of Examples: got {type(batches).__name__}")
    for item in batches:
        if not isinstance(item, Examples):
            raise ValueError(
                f"{name} must hold Examples, Examples(inputs, labels, side_inputs): got {type(item).__name__}"
            )


def require_loss_tokens(name: str, batches: Iterable[Examples]) -> None:
    """Raise ValueError where no label of any batch counts, or for what is no sequence of ``Examples``."""
    require_examples(name, batches)
    if not any(bool((examples.labels >= 0).any()) for examples in batches):
        raise ValueError(f"{name} holds no loss token")


def norm(tensors: Iterable[Tensor]) -> float:
    """Of all tensors together."""
    return sum(t.detach().double().square().sum().item() for t in tensors) ** 0.5
