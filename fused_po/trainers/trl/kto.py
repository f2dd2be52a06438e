"""``FusedKTOTrainer``: TRL's KTO trainer with the policy's head and the loss in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import KTOTrainer

from fused_po import losses
from fused_po.splits import Split
from fused_po.trainers.trl import hook
from fused_po.trainers.trl.one_pass import IGNORE, OnePass, Policy, SplitOverTraining
from fused_po.trainers.trl.trainable import Trainable

__all__ = ["FusedKTOTrainer"]


class FusedKTOTrainer(SplitOverTraining, Trainable, KTOTrainer):
    """``trl.KTOTrainer`` that makes the gradient of loss and head in the pass that makes the log-probs: 3 large matrix
    products with a trained head and 2 with a frozen one, where TRL takes 4 and 3.

    ``kto`` and ``apo_zero_unpaired``, weights of the two sides, precomputed reference log-probs and all metrics;
    arguments as there. Images without precomputed reference log-probs take TRL's own path, with log-probs from
    ``linear_token_stats``.

    Args:
        split: scales positive and negative learning, and the loss's own weights (``fused_po.Split``). Its schedules
            follow the steps of the training. None: the loss itself. The loss that is logged is not changed by it.
    """

    # of TRL's trainer
    _is_vision_dataset: bool
    _compute_kl_logps: Any

    def __init__(self, *args: Any, split: Split | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split = split

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        with hook.enabled():
            # TRL makes the reference's log-probs of images inside its own loss alone
            if self._is_vision_dataset and not self.precompute_ref_logps:
                if self.split is not None:
                    raise ValueError("split= with images needs precompute_ref_log_probs=True")
                return super()._compute_loss(model, inputs, return_outputs)
            inputs = {**inputs, **self._references(inputs)}
            side_inputs = {"ref_logp": inputs["ref_logps"], "desirable": inputs["label"].bool()}
            if self.calculate_KL:
                # the policy's own part of the reference point comes from another batch; TRL's code then asks again
                own = self._compute_kl_logps(model, inputs)
                kl = (own - inputs["ref_KL_logps"]).mean().detach()
                side_inputs["kl"] = self.accelerator.gather_for_metrics(kl).mean().clamp(min=0)
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)[:, 1:]
            named = {"beta": self.beta, "desirable_weight": self.desirable_weight}
            loss = losses.create(self.loss_type, undesirable_weight=self.undesirable_weight, **named)
            policy = Policy(model, OnePass(loss, labels, side_inputs, self.split_now()))
            kept = self.precompute_ref_logps, self._compute_kl_logps
            self.precompute_ref_logps = True
            if self.calculate_KL:
                self._compute_kl_logps = lambda *_: own
            try:
                found = super()._compute_loss(policy, inputs, return_outputs)
            finally:
                self.precompute_ref_logps, self._compute_kl_logps = kept
        if return_outputs:
            return policy.connected(found[0]), found[1]
        return policy.connected(found)

    def _references(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Reference log-probs of the answers and of the mismatched ones, precomputed or not."""
        if self.precompute_ref_logps:
            return {}
        reference = self.model if self.ref_model is None else self.ref_model
        answers, mismatched = self.compute_ref_log_probs(reference, inputs)
        return {"ref_logps": answers} | ({} if mismatched is None else {"ref_KL_logps": mismatched})
