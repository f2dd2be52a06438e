"""Liger's GRPO class on ``linear_loss``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats
from fused_po.ops.checks import IGNORE

__all__ = ["LigerFusedLinearGRPOLoss"]

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# those that divide by the tokens of all processes
GLOBAL_TOKENS = ("dapo", "cispo", "vespo")
TOKEN_LEVEL = ("cispo", "sapo", "vespo")


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO's eight loss types; a reference that is not given as log-probs is computed here, without gradient.

    ``luspo`` is the mean over sequences of the sums over their loss tokens, as in TRL and in its paper (arXiv
    2602.05261). Liger's (0.8) also sums what stands at masked positions and divides by the padded length, so its value
    depends on the padding; both agree where every term is one per sequence (``importance_sampling_level="sequence"``
    and ``beta=0``).

    Args:
        beta, use_ref_model, epsilon_low, epsilon_high, loss_type, importance_sampling_level, sapo_temperature_pos,
            sapo_temperature_neg, temperature, delta, use_bias_correction_kl, vespo_k_pos, vespo_lambda_pos,
            vespo_k_neg, vespo_lambda_neg: Liger's. Of ``cispo`` ``epsilon_high`` is the cap of the ratio itself.
        max_completion_length: of ``dr_grpo``, which needs it.
        compiled, chunk_size: of Liger's own way through the batch; they change nothing here.

    Raises:
        ValueError: an unknown ``loss_type``, ``dr_grpo`` without ``max_completion_length``, ratios per sequence with
            ``cispo``, ``sapo`` or ``vespo`` (Liger refuses them in the call), or a number out of range.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type not in TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(TYPES)}: got {loss_type!r}")
        if importance_sampling_level == "sequence" and loss_type in TOKEN_LEVEL:
            raise ValueError(f"{loss_type} has ratios per token: importance_sampling_level='sequence' is not supported")
        options: dict[str, Any] = {}
        if loss_type == "dr_grpo":
            if max_completion_length is None:
                raise ValueError("dr_grpo needs max_completion_length")
            options["max_completion_length"] = max_completion_length
        if loss_type == "sapo":
            options |= {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        if loss_type == "vespo":
            options |= {"vespo_k_pos": vespo_k_pos, "vespo_lambda_pos": vespo_lambda_pos}
            options |= {"vespo_k_neg": vespo_k_neg, "vespo_lambda_neg": vespo_lambda_neg}
        self.loss = losses.create(
            loss_type,
            # against itself, the policy has no KL and no gradient of it
            beta=beta if use_ref_model else 0.0,
            epsilon=epsilon_low,
            epsilon_high=epsilon_high,
            delta=delta,
            importance_sampling_level=importance_sampling_level,
            use_bias_correction_kl=use_bias_correction_kl,
            **options,
        )
        self.beta, self.loss_type, self.temperature, self.use_ref_model = beta, loss_type, temperature, use_ref_model

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the metrics of Liger's class of the same name.

        Args:
            _input: (B, S, H), hidden states of the completions.
            lin_weight: (V, H).
            selected_token_ids: (B, S) int64.
            attention_mask: (B, S), 0 where a token carries no loss.
            advantages: (B,).
            bias: (V,) or None.
            ref_per_token_logps, old_per_token_logps: (B, S).
            ref_input, ref_weight, ref_bias: the reference's, where its log-probs are not given.
            vllm_is_ratio: (B,), (B, 1) or (B, S).
            num_items_in_batch: loss tokens of all processes and accumulation steps (``dapo``, ``cispo``, ``vespo``);
                None counts those of this call on all processes.

        Returns:
            The loss, and ``(kl, clip fraction)`` without ``kl`` where ``beta`` is 0; () each. The clip fraction is
            counted behind ``delta``, which hides what lies above where it is below ``1 + epsilon_high``.

        Raises:
            ValueError: no reference where ``use_ref_model`` wants one, or what ``linear_loss`` refuses.
        """
        keep = attention_mask != 0
        labels = selected_token_ids.masked_fill(~keep, IGNORE)
        # per token, so that the clip fraction counts tokens also where ratios are those of sequences
        given: dict[str, Any] = {"advantage": advantages[:, None].expand(labels.shape)}
        if self.use_ref_model and "ref_logp" in self.loss.needs:
            given["ref_logp"] = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, labels)
        elif self.use_ref_model and ref_per_token_logps is None and ref_input is None:
            raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
        if old_per_token_logps is not None:
            given["old_logp"] = old_per_token_logps
        if vllm_is_ratio is not None:
            given["importance_weight"] = self._importance(vllm_is_ratio, keep)
        if self.loss_type in GLOBAL_TOKENS:
            given["num_items"] = _num_items(num_items_in_batch, keep)
        out = linear_loss(_input, lin_weight, labels, self.loss, bias=bias, temperature=self.temperature, **given)
        found = out.metrics
        zero = torch.zeros_like(found["entropy"])
        metrics = [found.get("kl", zero)] if self.beta != 0.0 else []
        metrics.append(found.get("clip_ratio/region_mean", found.get("cispo_clip_ratio", zero)))
        return out.loss, tuple(metric.to(out.loss.dtype) for metric in metrics)

    def _reference(
        self, logps: Tensor | None, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """The reference's log-probs, (B, S)."""
        if logps is not None:
            return logps
        if hidden is None or weight is None:
            raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight")
        with torch.no_grad():
            found = linear_token_stats(hidden, weight, labels, bias=bias, temperature=self.temperature).logp
        assert found is not None
        return found

    def _importance(self, ratio: Tensor, keep: Tensor) -> Tensor:
        """The sampler's weights, (B,) or (B, S)."""
        if ratio.ndim == 2 and ratio.shape[1] == keep.shape[1]:
            return ratio
        ratio = ratio.reshape(ratio.shape[0])
        if self.loss_type != "vespo":
            return ratio
        # VESPO multiplies the weights of a sequence's tokens: the first one carries that of the sequence
        first = keep & (keep.cumsum(1) == 1)
        return torch.where(first, ratio[:, None], torch.ones_like(ratio[:, None]))


def _num_items(given: int | float | Tensor | None, keep: Tensor) -> Tensor | float:
    """What tokens are divided by: those of all processes over the number of processes, since DDP averages gradients."""
    several = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if several else 1
    if isinstance(given, Tensor):
        return (given / world).clamp(min=1.0)
    if given is not None:
        return max(given / world, 1.0)
    count = keep.sum().double()
    if several:
        dist.all_reduce(count)
    return count / world
