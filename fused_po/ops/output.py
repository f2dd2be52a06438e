"""What a loss returns: its value, metrics and statistics, and the gradients of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.losses.contract import Batch, Loss, Named, per_token
from fused_po.ops.batches import Layout
from fused_po.ops.coefficients import sided_coefficients
from fused_po.ops.devices import has_values
from fused_po.splits import tertiles
from fused_po.stats import Stats, described

__all__ = ["SIDES", "THIRDS", "LossOutput", "SplitGradients", "part_names", "parts_of"]

SIDES = ("positive", "negative", "rest")
THIRDS = ("top", "middle", "bottom", "rest")


@dataclass(frozen=True, repr=False)
class SplitGradients:
    """Gradients of the parts of a loss. Each token belongs to one part, with all that the loss makes of it, so the
    parts sum to the whole gradient.

    Attributes:
        names: of the parts: ``positive``, ``negative`` and ``rest`` (tokens without a side), or ``top``, ``middle``,
            ``bottom`` and ``rest``.
        hidden: by part, the gradient of the hidden states in their shape, 0 outside the part; empty if not wanted.
        weight: by part, the gradient of the weight (V, H); empty for a frozen head.
        bias: by part, the gradient of the bias (V,); empty without one.
    """

    names: tuple[str, ...]
    hidden: Mapping[str, Tensor]
    weight: Mapping[str, Tensor]
    bias: Mapping[str, Tensor]

    @staticmethod
    def of(
        names: tuple[str, ...], kept: dict[str, Tensor], layout: Layout, shape: torch.Size, rows: int
    ) -> SplitGradients:
        """From what a call kept, nothing without gradients; ``rows`` are those of the weight, padded ones too."""
        hidden: dict[str, Tensor] = {}
        if "hidden" in kept:
            groups = kept["groups"].new_full((layout.labels.numel(),), -1)
            layout.rows.scatter(groups, kept["groups"])
            for index, name in enumerate(names):
                own = (groups == index).unsqueeze(1)
                hidden[name] = torch.where(own, kept["hidden"], 0.0).reshape(shape)
        head = {
            kind: {name: _padded(kept[f"{kind}/{name}"], rows) for name in names if f"{kind}/{name}" in kept}
            for kind in ("weight", "bias")
        }
        by_part = {kind: Named("part", found) for kind, found in {"hidden": hidden, **head}.items()}
        return SplitGradients(names, **by_part)

    def norms(self) -> dict[str, dict[str, Tensor]]:
        """``norms()["weight"]["positive"]``: the norm of a part's gradient, for each kind that there is."""
        return {kind: {name: grad.double().norm() for name, grad in parts.items()} for kind, parts in self._kinds()}

    def inner(self, first: str = "positive", second: str = "negative") -> dict[str, Tensor]:
        """The inner product of the gradients of two parts, by kind; 0 for ``hidden``, where parts do not overlap."""
        return {kind: (parts[first].double() * parts[second].double()).sum() for kind, parts in self._kinds()}

    def cosine(self, first: str = "positive", second: str = "negative") -> dict[str, Tensor]:
        """The cosine between the gradients of two parts, by kind: -1 where they offset each other entirely, NaN where
        one of them is 0.
        """
        norms, inner = self.norms(), self.inner(first, second)
        return {kind: inner[kind] / (norms[kind][first] * norms[kind][second]) for kind in inner}

    def __repr__(self) -> str:
        kinds = (f"{kind}: {described(next(iter(parts.values())))} each" for kind, parts in self._kinds())
        return f"SplitGradients({', '.join(self.names)}; {', '.join(kinds)})"

    def _kinds(self) -> list[tuple[str, Mapping[str, Tensor]]]:
        return [(kind, getattr(self, kind)) for kind in ("hidden", "weight", "bias") if getattr(self, kind)]


@dataclass(frozen=True, repr=False)
class LossOutput:
    """What ``linear_loss`` and ``stats_loss`` return.

    Attributes:
        loss: (), float32 (float64 for float64); call ``.backward()`` on it, once.
        metrics: detached scalars, named as TRL names them.
        stats: the statistics that the loss and its metrics read, and those asked for by ``outputs``; detached, in the
            shape of labels, 0 where ignored.
        split_gradients: gradients of the parts, where they were asked for. They are those of ``loss`` itself; what
            ``backward`` multiplies it by is not in them.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    stats: Stats
    split_gradients: SplitGradients | None = None

    def __repr__(self) -> str:
        # numbers of a GPU are worth a wait here
        metrics = ", ".join(f"{name}: {_number(value)}" for name, value in self.metrics.items())
        parts = "" if self.split_gradients is None else f", split_gradients={self.split_gradients}"
        return f"LossOutput(loss={_number(self.loss)}, metrics={{{metrics}}}, stats={self.stats}{parts})"


def part_names(split_gradients: bool | str) -> tuple[str, ...]:
    """The parts that were asked for.

    Raises:
        ValueError: asked for in inference mode, which knows no derivatives; while tracing, where the size of a part is
            not known; or neither a bool nor ``"sides"`` nor ``"thirds"``.
    """
    if split_gradients is False:
        return ()
    if torch.is_inference_mode_enabled():
        raise ValueError("split_gradients differentiates the loss, which torch.inference_mode forbids")
    if torch.compiler.is_compiling():
        raise ValueError("split_gradients can't be traced by torch.compile: the size of a part follows from the data")
    if split_gradients is True or split_gradients == "sides":
        return SIDES
    if split_gradients == "thirds":
        return THIRDS
    raise ValueError(f'split_gradients must be True, False, "sides" or "thirds": got {split_gradients!r}')


def parts_of(names: tuple[str, ...], loss: Loss, stats: Stats, batch: Batch) -> Tensor:
    """The part of each row, an index into ``names``: (N,) int64. Thirds are those of answers or tokens with a side."""
    role = per_token(loss.role(batch), batch, "role", loss)
    rest = len(names) - 1
    if names == SIDES:
        return torch.where(role > 0, 0, torch.where(role < 0, 1, rest))
    weight = loss.weight(sided_coefficients(loss, stats, batch), batch)
    # those without a side make a group of their own
    if loss.weighs_sequences:
        sideless = (batch.sum_per_sequence(role != 0) == 0).long()
        thirds = batch.spread(tertiles(batch.mean_per_sequence(weight), sideless))
    else:
        thirds = tertiles(weight, ((role == 0) | ~batch.loss_tokens()).long())
    return torch.where(role != 0, 2 - thirds, rest)


def _number(value: Tensor) -> str:
    return f"{value.item():.6g}" if has_values(value) else described(value)


def _padded(gradient: Tensor, rows: int) -> Tensor:
    """With a zero for each padded row of the head: (V, ...) -> (rows, ...)."""
    missing = rows - gradient.shape[0]
    return torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])]) if missing else gradient
