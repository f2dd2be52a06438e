"""Liger's KTO class on ``linear_loss``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_po import losses
from fused_po.ops import linear_loss
from fused_po.ops.checks import IGNORE
from fused_po.trainers.liger.pairs import Outputs, reference_logp

__all__ = ["LigerFusedLinearKTOLoss"]


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO on single answers; the reference's log-probs are made here, without gradient.

    An answer without a single loss token adds nothing to the loss (Liger: a constant).

    Args:
        ignore_index, beta, use_ref_model: Liger's.
        compiled, chunk_size: of Liger's own way through the batch; they change nothing here.
        average_log_prob: False; True is refused: KTO's reward is a sum over tokens.

    Raises:
        ValueError: ``average_log_prob=True``, or a ``beta`` below 0.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        if average_log_prob:
            raise ValueError("average_log_prob=True is not here: KTO's reward is the sum of log-ratios over tokens")
        super().__init__()
        self.loss = losses.create("kto", beta=beta)
        self.ignore_index, self.beta, self.use_ref_model = ignore_index, beta, use_ref_model

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Outputs]:
        """The loss and the outputs of Liger's class of the same name.

        Args:
            _input: (B, S, H).
            lin_weight: (V, H).
            target: (B, S) int64.
            bias: (V,) or None.
            preference_labels: (B,) bool, True where the answer is desirable; required.
            ref_input, ref_weight, ref_bias: the reference's, where ``use_ref_model``.
            kl: a number, the reference point z0; None: 0.

        Returns:
            The loss, and sums over the desirable, then over the other answers: of log-probs, of logits (over all
            positions and classes), of rewards; () each.

        Raises:
            ValueError: no ``preference_labels``, no reference where one is wanted, or what ``linear_loss`` refuses.
        """
        if preference_labels is None:
            raise ValueError("preference_labels are needed: (B,) bool, True where an answer is desirable")
        labels = target.masked_fill(target == self.ignore_index, IGNORE)
        reference = _input.new_zeros(target.shape[0], dtype=torch.float32)
        if self.use_ref_model:
            reference = reference_logp(ref_input, ref_weight, labels, ref_bias)
        point = _input.new_zeros((), dtype=torch.float32) if kl is None else kl
        out = linear_loss(
            _input,
            lin_weight,
            labels,
            self.loss,
            bias=bias,
            ref_logp=reference,
            desirable=preference_labels,
            kl=point,
        )
        assert out.stats.logp is not None
        with torch.no_grad():
            dtype = out.stats.logp.dtype
            logp = out.stats.logp.double().sum(1)  # (B,)
            rewards = self.beta * (logp - reference)
            # a sum of linear numbers needs no GEMM: that over the classes is one vector
            classes = lin_weight.sum(0, dtype=torch.float64)  # (H,)
            logits = _input.sum(1, dtype=torch.float64) @ classes  # (B,)
            if bias is not None:
                logits = logits + target.shape[1] * bias.sum(dtype=torch.float64)
            sums = [
                torch.where(members, values, 0.0).sum().to(dtype)
                for values in (logp, logits, rewards)
                for members in (preference_labels, ~preference_labels)
            ]
        return out.loss, tuple(sums)
