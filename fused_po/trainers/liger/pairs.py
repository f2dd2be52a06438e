"""Liger's preference losses of pairs on ``linear_loss``: DPO, SimPO, CPO and ORPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_po import losses
from fused_po.losses import Loss
from fused_po.ops import linear_loss, linear_token_stats
from fused_po.ops.checks import IGNORE, looks_at

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "reference_logp",
]

# chosen and rejected log-probs (P,), their mean logits (), the NLL (), then chosen and rejected rewards (P,)
Outputs = tuple[Tensor, ...]


def reference_logp(hidden: Tensor | None, weight: Tensor | None, labels: Tensor, bias: Tensor | None) -> Tensor:
    """The reference's log-prob of each sequence, (B,) float64, without gradient.

    Args:
        hidden: (B, S, H).
        weight: (V, H).
        labels: (B, S), -100 ignored.
        bias: (V,) or None.

    Raises:
        ValueError: hidden states or weight are missing.
    """
    if hidden is None or weight is None:
        raise ValueError("use_ref_model=True needs ref_input and ref_weight")
    with torch.no_grad():
        found = linear_token_stats(hidden, weight, labels, bias=bias).logp
    assert found is not None
    return found.double().sum(1)


class _PreferenceLoss(nn.Module):
    """What the four share.

    Args:
        loss: what is trained.
        ignore_index: of the targets.
        beta: of the rewards.
        averaged: log-probs of answers are means over their tokens, and not sums.
        nll: whether the NLL of the chosen answers is a part of the loss.
    """

    def __init__(self, loss: Loss, *, ignore_index: int, beta: float, averaged: bool, nll: bool) -> None:
        super().__init__()
        self.loss, self.ignore_index, self.beta, self.averaged, self.nll = loss, ignore_index, beta, averaged, nll

    def _run(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, **side_inputs: Any
    ) -> tuple[Tensor, Outputs, dict[str, Tensor]]:
        """The loss, what Liger returns beside it, and the metrics of the loss.

        Args:
            weight: (V, H).
            hidden: (2P, S, H), first half chosen.
            target: (2P, S).
            bias: (V,) or None.
            side_inputs: of the loss; with ``nll_mask`` also ``nll_labels`` (2P, S), the labels with those of the NLL.
        """
        nll_mask = side_inputs.get("nll_mask")
        labels = target.masked_fill(target == self.ignore_index, IGNORE)
        if nll_mask is not None:
            labels = side_inputs.pop("nll_labels")
        out = linear_loss(hidden, weight, labels, self.loss, bias=bias, **side_inputs)
        assert out.stats.logp is not None
        with torch.no_grad():
            logp = out.stats.logp.double()
            answers = logp if nll_mask is None else logp.masked_fill(nll_mask, 0.0)
            counted = target != self.ignore_index
            summed = answers.sum(1)
            scores = (summed / counted.sum(1) if self.averaged else summed).to(out.stats.logp.dtype)
            chosen, rejected = scores.chunk(2)
            half = chosen.shape[0]
            nll = -logp[:half].sum() / (labels[:half] != IGNORE).sum() if self.nll else logp.new_zeros(())
            # over all positions and classes, as Liger has it: a mean of linear numbers needs no GEMM
            means = hidden.reshape(2, -1, hidden.shape[-1]).mean(1) @ weight.mean(0).to(hidden.dtype)
            means = means if bias is None else means + bias.mean()
        dtype = scores.dtype
        outputs = (chosen, rejected, *means.to(dtype), nll.to(dtype), self.beta * chosen, self.beta * rejected)
        return out.loss, outputs, out.metrics


# of Liger's class; others by losses.create, which has more of them
DPO_TYPES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair"),
    *("sppo_hard", "apo_zero", "apo_down", "discopop"),
)


class LigerFusedLinearDPOLoss(_PreferenceLoss):
    """DPO and nine of its relatives; the reference's log-probs are made here, without gradient.

    Args:
        ignore_index, beta, alpha, compute_nll_loss, use_ref_model, loss_type, label_smoothing, discopop_tau: Liger's.
        compiled, chunk_size: of Liger's own way through the batch; they change nothing here.
        average_log_prob: False; True is refused, ``losses.create("sigmoid_norm")`` is that loss.

    Raises:
        ValueError: ``average_log_prob=True``, a ``loss_type`` that Liger has not, or hyper-parameters that the loss
            refuses.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        if average_log_prob:
            raise ValueError("average_log_prob=True is not here: losses.create('sigmoid_norm') is DPO on means")
        if loss_type not in DPO_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(DPO_TYPES)}, which Liger has: got {loss_type!r}")
        known = {
            "label_smoothing": label_smoothing if loss_type in ("robust", "exo_pair") else None,
            "discopop_tau": discopop_tau if loss_type == "discopop" else None,
        }
        named: dict[str, Any] = {"beta": beta, **{name: v for name, v in known.items() if v is not None}}
        names: Sequence[str] = [loss_type, "sft"] if compute_nll_loss else [loss_type]
        weights = [1.0, alpha] if compute_nll_loss else [1.0]
        loss = losses.create(names, loss_weights=weights, **named)
        super().__init__(loss, ignore_index=ignore_index, beta=beta, averaged=False, nll=compute_nll_loss)
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Outputs]:
        """The loss and the outputs of Liger's class of the same name."""
        if not self.use_ref_model:
            reference = _input.new_zeros(target.shape[0], dtype=torch.float32)
        else:
            labels = target.masked_fill(target == self.ignore_index, IGNORE)
            reference = reference_logp(ref_input, ref_weight, labels, ref_bias)
        loss, outputs, _ = self._run(lin_weight, _input, target, bias, ref_logp=reference)
        chosen, rejected = reference.to(outputs[0].dtype).chunk(2)
        rewards = self.beta * (outputs[0] - chosen), self.beta * (outputs[1] - rejected)
        return loss, (*outputs[:5], *rewards)


class _WithoutReference(_PreferenceLoss):
    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Outputs]:
        """The loss and the outputs of Liger's class of the same name."""
        return self._run(lin_weight, _input, target, bias)[:2]


class LigerFusedLinearSimPOLoss(_WithoutReference):
    """SimPO; arguments are Liger's, ``compiled`` and ``chunk_size`` change nothing here."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        nll = alpha if compute_nll_loss else 0.0
        loss = losses.create("simpo", beta=beta, simpo_gamma=gamma, cpo_alpha=nll, label_smoothing=label_smoothing)
        super().__init__(loss, ignore_index=ignore_index, beta=beta, averaged=True, nll=compute_nll_loss)


class LigerFusedLinearCPOLoss(_WithoutReference):
    """CPO; arguments are Liger's, ``compiled`` and ``chunk_size`` change nothing here.

    Raises:
        ValueError: ``average_log_prob=True``: that is SimPO without its margin.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        if average_log_prob:
            raise ValueError("average_log_prob=True is not here: it is LigerFusedLinearSimPOLoss with gamma=0")
        nll = alpha if compute_nll_loss else 0.0
        loss = losses.create("cpo", beta=beta, cpo_alpha=nll, label_smoothing=label_smoothing)
        super().__init__(loss, ignore_index=ignore_index, beta=beta, averaged=False, nll=compute_nll_loss)


class LigerFusedLinearORPOLoss(_PreferenceLoss):
    """ORPO; arguments are Liger's, ``compiled`` and ``chunk_size`` change nothing here.

    Raises:
        ValueError: ``compute_nll_loss=False``: ORPO's loss is the NLL and the odds ratio.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        if not compute_nll_loss:
            raise ValueError("compute_nll_loss=False is not here: ORPO's loss is the NLL and the odds ratio")
        loss = losses.create("orpo", beta=beta)
        super().__init__(loss, ignore_index=ignore_index, beta=beta, averaged=True, nll=True)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Outputs]:
        """The loss and the outputs of Liger's class of the same name.

        Args:
            nll_target: (2P, S), labels of the NLL, those of the prompts among them; None: ``target``.

        Raises:
            ValueError: ``nll_target`` ignores a token of an answer, or has another label there; noticed on a CPU, or
                with ``FUSED_PO_CHECK=1``.
        """
        given: dict[str, Tensor] = {}
        if nll_target is not None:
            half = target.shape[0] // 2
            if looks_at(target) and bool(((target != nll_target) & (target != self.ignore_index))[:half].any()):
                raise ValueError("nll_target must have the labels of target where that has any: the NLL is over both")
            labels = torch.where(target != self.ignore_index, target, nll_target)
            labels = labels.masked_fill(labels == self.ignore_index, IGNORE)
            given = {"nll_labels": labels, "nll_mask": (labels != IGNORE) & (target == self.ignore_index)}
        loss, outputs, metrics = self._run(lin_weight, _input, target, bias, **given)
        # not of the outputs, where an answer may be certain to rounding
        odds = (metrics[name].to(outputs[0].dtype) for name in ("log_odds_ratio", "log_odds_chosen"))
        return loss, (*outputs, *odds)
