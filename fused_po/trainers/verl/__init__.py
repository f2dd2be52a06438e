"""verl's fused log-probs and its policy losses; nothing is changed by importing this, and it needs no verl.

::

    from fused_po.trainers import verl

    verl.enable()  # log-probs and entropies of actors with use_fused_kernels=True
    verl.register_policy_losses()  # actor.policy_loss.loss_mode=fused_po_vanilla, fused_po_gspo, ...
    verl.disable()
"""

from fused_po.trainers.verl.head import (
    FusedLinearForPPO,
    PPOOutput,
    forward_with_fused_po,
    linear_cross_entropy,
    note_forward,
)
from fused_po.trainers.verl.hook import Enabled, calls, disable, enable, is_enabled
from fused_po.trainers.verl.policy import POLICY_LOSSES, PolicyLossFunction, policy_loss, register_policy_losses

__all__ = [
    "POLICY_LOSSES",
    "Enabled",
    "FusedLinearForPPO",
    "PPOOutput",
    "PolicyLossFunction",
    "calls",
    "disable",
    "enable",
    "forward_with_fused_po",
    "is_enabled",
    "linear_cross_entropy",
    "note_forward",
    "policy_loss",
    "register_policy_losses",
]
