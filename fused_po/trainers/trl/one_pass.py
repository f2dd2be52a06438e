"""A loss's gradient made in the same pass over the head as its log-probs, inside TRL's own ``_compute_loss``.

TRL's code runs as it is, on statistics without a graph: it computes the loss that is reported and every metric. The
gradient comes from ``linear_loss``, called where TRL would take log-probs, inside the forward of the wrapped model, so
that hooks of DDP, FSDP, ZeRO and autocast fire. It reaches the model through the log-probs that the model returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fused_po import losses
from fused_po.losses import Loss
from fused_po.ops import linear_loss
from fused_po.splits import Split
from fused_po.stats import Stats
from fused_po.trainers.trl import hook

__all__ = ["OnePass", "Policy", "SplitOverTraining", "accepted"]

IGNORE = -100


@dataclass
class OnePass:
    """What the call of the policy's head needs beside the head.

    Attributes:
        loss: from ``losses.create``.
        labels: (B, S), shifted, -100 ignored.
        side_inputs: of the loss, (B,), (B, S) or scalars.
        split: how the sides count, or None.
        num_items: what token means divide by, or None.
    """

    loss: Loss
    labels: Tensor
    side_inputs: Mapping[str, Any]
    split: Split | None = None
    num_items: Tensor | float | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor, asked: tuple[str, ...], **head: Any) -> Stats:
        """Statistics of TRL's rows; what arrives at the log-probs in backward is the gradient of the loss.

        Raises:
            ValueError: rows that are not those of the labels (prompt-learning adapters add some).
        """
        keep = self.labels != IGNORE
        options = {"split": self.split, "num_items": self.num_items, "outputs": asked, **head}
        if hidden.shape[0] == keep.numel():
            shaped = hidden.reshape(*self.labels.shape, hidden.shape[-1])
            out = linear_loss(shaped, weight, self.labels, self.loss, **options, **self.side_inputs)
            stats, kept = out.stats, keep.reshape(-1)
        else:
            # TRL has dropped the rows without a label
            bounds = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
            packed = {name: self._packed(value, keep) for name, value in self.side_inputs.items()}
            rows = self.labels[keep]
            if rows.shape != targets.shape:
                raise ValueError(
                    f"{tuple(targets.shape)} rows for {tuple(rows.shape)} labels: adapters that add tokens to the "
                    "prompt are not for these trainers; TRL's own work with fused_po.trainers.trl.enable()"
                )
            out = linear_loss(hidden, weight, rows, self.loss, cu_seqlens=bounds, **options, **packed)
            stats, kept = out.stats, torch.ones_like(rows, dtype=torch.bool)
        found = {name: getattr(stats, name).reshape(-1) for name in asked}
        return Stats(**{**found, "logp": _Carried.apply(found["logp"], out.loss, kept)})

    @staticmethod
    def _packed(value: Any, keep: Tensor) -> Any:
        """Per token (1, N) and per sequence (B, 1): what it is must not hang on whether there are as many of both."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value[keep].unsqueeze(0) if value.shape == keep.shape else value.unsqueeze(1)


class _Carried(torch.autograd.Function):
    """Log-probs that hand the mean of what arrives at those that count on to a loss."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, loss: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.dtype = loss.dtype
        return logp.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (kept,) = ctx.saved_tensors
        arrived = torch.where(kept, grad, 0.0).sum(dtype=torch.float64) / kept.sum().clamp_min(1)
        return None, arrived.to(ctx.dtype), None


class _Connect(torch.autograd.Function):
    """A loss's value, whose gradient arrives at log-probs, at each the same."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, logp: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = logp.shape, logp.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.to(ctx.dtype).expand(ctx.shape)


class Policy:
    """The wrapped model as TRL's ``_compute_loss`` sees it: its first call with a fused head is the one pass.

    Raises:
        ValueError: ``torch.nn.DataParallel``, whose replicas see parts of the batch that the loss must see whole.
    """

    def __init__(self, model: Any, call: OnePass) -> None:
        if isinstance(model, torch.nn.DataParallel):
            raise ValueError(
                "DataParallel hands each replica a part of the pairs: start with accelerate launch or torchrun, or "
                "use TRL's own trainer with fused_po.trainers.trl.enable()"
            )
        self._model, self._call = model, call
        self._logp: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._logp is not None or not kwargs.get("fused_lm_head"):
            return self._model(*args, **kwargs)
        function = getattr(import_module("trl.trainer.utils"), hook.NAME)
        function.pending = self._call
        try:
            outputs = self._model(*args, **kwargs)
        finally:
            function.pending = None
        self._logp = outputs.log_probs
        # what TRL computes from them is for the log
        outputs.log_probs = self._logp.detach()
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def connected(self, loss: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """TRL's loss, with the gradient of ours times ``scale`` added to what it has (a load-balancing loss)."""
        assert self._logp is not None
        if not self._logp.requires_grad:
            return loss
        carried = _Connect.apply(torch.zeros_like(loss), self._logp)
        return loss + scale * carried


class SplitOverTraining:
    """Of a trainer: ``split`` at the fraction of the training that is done."""

    split: Split | None = None
    # of TRL's trainers
    state: Any
    precompute_ref_logps: bool

    def split_now(self) -> Split | None:
        if self.split is None:
            return None
        return self.split.at(min(1.0, self.state.global_step / max(1, self.state.max_steps)))


def accepted(names: list[str], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that one of the losses has."""
    known = {one.name for name in names for one in fields(losses.create(name))}
    return {name: value for name, value in hyperparameters.items() if name in known}
