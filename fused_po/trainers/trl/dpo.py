"""``FusedDPOTrainer``: TRL's DPO trainer with the policy's head and the loss in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from fused_po import losses
from fused_po.splits import Split
from fused_po.trainers.trl import hook
from fused_po.trainers.trl.one_pass import IGNORE, OnePass, Policy, SplitOverTraining, accepted
from fused_po.trainers.trl.trainable import Trainable

__all__ = ["FusedDPOTrainer"]


class FusedDPOTrainer(SplitOverTraining, Trainable, DPOTrainer):
    """``trl.DPOTrainer`` that makes the gradient of loss and head in the pass that makes the log-probs: 3 large matrix
    products with a trained head and 2 with a frozen one, where TRL takes 4 and 3.

    All of TRL's ``loss_type`` names and lists, divergences, ``use_weighting``, ``ld_alpha``, precomputed reference
    log-probs and metrics; arguments as there.

    Args:
        split: scales positive and negative learning, and the loss's own weights (``fused_po.Split``). Its schedules
            follow the steps of the training. None: the loss itself. The loss that is logged is not changed by it.
    """

    def __init__(self, *args: Any, split: Split | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.split = split

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        with hook.enabled():
            inputs = {**inputs, **self._reference(inputs)}
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)[:, 1:]
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            loss = self._loss()
            side_inputs = {"ref_logp": reference} if "ref_logp" in loss.needs else {}
            policy = Policy(model, OnePass(loss, labels, side_inputs, self.split_now()))
            precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
            try:
                found = super()._compute_loss(policy, inputs, return_outputs)
            finally:
                self.precompute_ref_logps = precomputed
        if return_outputs:
            return policy.connected(found[0]), found[1]
        return policy.connected(found)

    def _reference(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Reference log-probs of chosen and rejected answers, (B,) each, precomputed or not."""
        if self.precompute_ref_logps:
            return {}
        reference = self.model if self.ref_model is None else self.ref_model
        chosen, rejected = self.compute_ref_log_probs(reference, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _loss(self) -> losses.Loss:
        named = {
            name: getattr(self, name)
            for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha")
        }
        # sft learns the chosen half, also where it stands alone
        named |= {"use_weighting": self.use_weighting, "discopop_tau": self.args.discopop_tau, "paired": True}
        types = list(self.loss_types)
        return losses.create(types, loss_weights=list(self.loss_weights), **accepted(types, named))
