"""``stats_loss``: a loss on statistics that another operation made, with any split."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_po.kernels.contract import accumulation_dtype
from fused_po.losses.contract import Batch, Loss
from fused_po.ops.batches import Layout, Number, call_batch, masked_stats
from fused_po.ops.checks import refuse_transforms, require_tensors, same_device
from fused_po.ops.coefficients import coefficients, loss_value
from fused_po.ops.output import LossOutput
from fused_po.ops.planning import Plan, default_plan
from fused_po.splits import Split, check_split
from fused_po.stats import Stats

__all__ = ["stats_loss"]


def stats_loss(
    stats: Stats,
    labels: Tensor,
    loss: Loss,
    *,
    cu_seqlens: Tensor | None = None,
    num_items: Number | None = None,
    num_sequences: Number | None = None,
    num_chosen_items: Number | None = None,
    split: Split | None = None,
    plan: Plan | None = None,
    **side_inputs: Number,
) -> LossOutput:
    """A loss by name on statistics from ``token_stats`` or ``linear_token_stats``; gradients flow on into them.

    Args:
        stats: in the shape of labels: those that ``loss.statistics`` names. Where one is missing that only the metrics
            read, ``.metrics`` is empty.
        labels: (B, S), or packed (N,) with ``cu_seqlens``; already shifted, -100 is ignored.
        loss: from ``fused_po.losses.create``.
        cu_seqlens: as in ``linear_loss``, and so are the others.
        num_items: loss tokens to normalise by.
        num_sequences: sequences to normalise by, twice the pairs.
        num_chosen_items: loss tokens of chosen answers to normalise by.
        split: scales positive and negative learning; the value stays that of the loss.
        plan: from ``make_plan``.
        side_inputs: what the loss reads besides, by name.

    Returns:
        LossOutput; ``.loss`` is differentiable in the statistics.

    Raises:
        ValueError: a statistic that the loss needs and that is missing or of another shape, and what ``linear_loss``
            raises.
    """
    if not isinstance(loss, Loss):
        raise ValueError(f"loss must come from fused_po.losses.create(name): got {loss!r}")
    loss.check(frozenset(side_inputs), _ARGUMENTS)
    refuse_transforms("stats_loss")
    check_split(split, loss)
    present = stats.present()
    missing = [name for name in loss.statistics if name in loss.needs and name not in present]
    if missing:
        raise ValueError(f"loss {loss.name!r} needs statistics that were not asked for: {', '.join(missing)}")
    require_tensors(labels=labels, **present)
    for name, value in present.items():
        if value.shape != labels.shape:
            raise ValueError(f"{name} must have the shape of labels {tuple(labels.shape)}: got {tuple(value.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64: got {labels.dtype}")
    same_device(labels, **present)
    if plan is None:
        layout = Layout.of(labels, default_plan(labels, cu_seqlens))
    else:
        layout = Layout.of(labels, plan, cu_seqlens)
    read = [name for name in loss.statistics if name in present]
    rows = {name: layout.rows.gather(present[name].reshape(-1)) for name in read}
    # of statistics in half precision at least the side inputs keep their digits
    wide = accumulation_dtype(rows["logp"].dtype)
    rows = {name: value.to(wide) if value.is_floating_point() else value for name, value in rows.items()}
    batch = call_batch(layout, side_inputs, num_items, num_sequences, torch.float64, num_chosen_items)
    others = {name: value.detach() for name, value in rows.items() if name not in loss.differentiates}
    through = [rows[name] for name in loss.differentiates]
    if torch.is_grad_enabled():
        value = _StatsLoss.apply(loss, split, batch, others, layout.mask, *through).to(wide)
    else:
        value = loss_value(loss, masked_stats(Stats(**rows), layout.mask), batch).to(wide)
    detached = Stats(**{name: rows[name].detach() for name in read})
    with torch.no_grad():
        complete = set(loss.statistics) <= set(present)
        metrics = loss.metrics(masked_stats(detached, layout.mask), batch) if complete else {}
        shaped = Stats(**{name: layout.fill(v) for name, v in detached.present().items()})
    return LossOutput(value, metrics, shaped)


_ARGUMENTS = frozenset(inspect.signature(stats_loss).parameters)


class _StatsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Loss,
        split: Split | None,
        batch: Batch,
        others: dict[str, Tensor],
        mask: Tensor | None,
        *through: Tensor,
    ) -> Tensor:
        given = dict(zip(loss.differentiates, through, strict=True))
        value, triple = coefficients(loss, masked_stats(Stats(**others, **given), mask), batch, split)
        ctx.save_for_backward(*(getattr(triple, name) for name in loss.differentiates))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, None, *(grad_output.to(c.dtype) * c for c in ctx.saved_tensors))
