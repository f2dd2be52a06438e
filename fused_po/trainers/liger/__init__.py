"""Liger's fused linear preference losses by their own names and arguments, on ``linear_loss``.

A class here takes what the class of the same name in ``liger_kernel.chunked_loss`` (0.8) takes and returns what it
returns::

    from fused_po.trainers.liger import LigerFusedLinearDPOLoss  # was: from liger_kernel.chunked_loss import ...

    loss, outputs = LigerFusedLinearDPOLoss(beta=0.1)(weight, hidden, target, ref_input=..., ref_weight=...)

As in Liger the preference losses of pairs take (weight, hidden, target), KTO and GRPO (hidden, weight, target).
"""

from fused_po.trainers.liger.grpo import LigerFusedLinearGRPOLoss
from fused_po.trainers.liger.kto import LigerFusedLinearKTOLoss
from fused_po.trainers.liger.pairs import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
