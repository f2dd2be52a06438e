"""``FusedGRPOTrainer``: TRL's GRPO trainer with the policy's head and the loss in one pass."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from fused_po import losses
from fused_po.splits import Split
from fused_po.trainers.trl import hook
from fused_po.trainers.trl.one_pass import IGNORE, OnePass, Policy, SplitOverTraining, accepted
from fused_po.trainers.trl.trainable import Trainable, flags_kept

__all__ = ["FusedGRPOTrainer", "with_entropy_of_the_call"]

# loss types whose normaliser spans the generation batch
OVER_TOKENS = ("cispo", "dapo", "vespo")


class FusedGRPOTrainer(SplitOverTraining, Trainable, GRPOTrainer):
    """``trl.GRPOTrainer`` that makes the gradient of loss and head in the pass that makes the log-probs: 3 large matrix
    products with a trained head and 2 with a frozen one, where TRL takes 4 and 3.

    All eight ``loss_type`` names, both importance sampling levels, clipping, KL penalty, entropy bonus, importance
    weights and masks; arguments as there. Tokens of tools, and an entropy quantile over several processes, are not for
    one pass: they take TRL's own path, with log-probs from ``linear_token_stats``.

    Args:
        split: scales positive and negative advantages and their size (``fused_po.Split``). Its schedules follow the
            steps of the training. None: the loss itself. The loss that is logged is not changed by it.

    Raises:
        ValueError: a split where TRL's own path is taken.
    """

    def __init__(self, *args: Any, split: Split | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split = split

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with hook.enabled():
            several = self.top_entropy_quantile < 1.0 and self.accelerator.num_processes > 1
            if "tool_mask" in inputs or several:
                if self.split is not None:
                    raise ValueError("split= is not for tokens of tools or an entropy quantile over several processes")
                return super()._compute_loss(model, inputs)
            accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
            over_tokens = self.loss_type in OVER_TOKENS
            scale = 1.0 if over_tokens else 1.0 / accumulated
            loss = self._loss(accumulated if over_tokens else 1)
            labels = self._labels(inputs)
            call = OnePass(loss, labels, self._side_inputs(loss, inputs, labels), self.split_now())
            if over_tokens:
                # as TRL scales the number of the generation batch to one accumulation window
                call.num_items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
                if self.model.training:
                    call.num_items = call.num_items * accumulated / self.args.steps_per_generation
            policy = Policy(model, call)
            return policy.connected(super()._compute_loss(policy, inputs), scale)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with flags_kept(self.model):
            return super()._generate_and_score_completions(*args, **kwargs)

    def _loss(self, entropy_divisor: int) -> losses.Loss:
        named = {
            "epsilon": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "max_completion_length": self.max_completion_length,
            "entropy_coef": self._entropy_weight() / entropy_divisor,
        }
        of_trainer = ("beta", "importance_sampling_level", "top_entropy_quantile", "off_policy_mask_threshold")
        of_arguments = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")
        vespo = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
        named |= {name: getattr(self, name) for name in of_trainer}
        named |= {name: getattr(self.args, name) for name in (*of_arguments, *vespo)}
        return with_entropy_of_the_call(losses.create(self.loss_type, **accepted([self.loss_type], named)))

    def _entropy_weight(self) -> float:
        """What TRL's controller applies in this step."""
        if not self._entropy_bonus_enabled:
            return 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef)

    @staticmethod
    def _labels(inputs: dict[str, Any]) -> Tensor:
        """(B, P + C - 1), -100 on prompts and padding."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attended = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
        return ids.masked_fill(attended == 0, IGNORE)[:, 1:]

    def _side_inputs(self, loss: losses.Loss, inputs: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
        found = {
            "advantage": inputs["advantages"],
            "old_logp": inputs.get("old_per_token_logps"),
            "ref_logp": inputs.get("ref_per_token_logps"),
            "sampling_logp": inputs.get("sampling_per_token_logps"),
        }
        if self.use_vllm and self.vllm_importance_sampling_correction:
            found["importance_weight"] = inputs.get("importance_sampling_ratio")
        return {
            name: _widened(value, labels) for name, value in found.items() if name in loss.needs and value is not None
        }


def with_entropy_of_the_call(loss: losses.Loss) -> losses.Loss:
    """The loss with TRL's entropy bonus: the mean over one micro-batch, whatever ``num_items_in_batch`` says."""
    kind = type(loss)
    mean = {"mean_entropy": staticmethod(lambda entropy, batch: batch.mean_call_tokens(entropy))}
    return type(kind.__name__, (kind,), mean)(**{one.name: getattr(loss, one.name) for one in fields(loss) if one.init})


def _widened(values: Tensor, labels: Tensor) -> Tensor:
    """(B,) as it is, (B, 1) without its axis, (B, C) to the shape of labels with 0 before the completions."""
    if values.ndim == 1:
        return values
    if values.shape[1] == 1:
        return values[:, 0]
    return torch.nn.functional.pad(values, (labels.shape[1] - values.shape[1], 0))
