"""Preference losses: each one dataclass, a pure function of per-token statistics. ``create(name, **hyperparameters)``
makes one.
"""

from fused_po.losses import (
    covariance,
    grpo,
    pairwise,
    pairwise_batch,
    pairwise_sides,
    policy,
    reference_free,
    reinforce,
    sft,
    unpaired,
)
from fused_po.losses.batch import Batch
from fused_po.losses.contract import HORIZONS, Loss, total
from fused_po.losses.mixture import Mixture
from fused_po.losses.registry import create, names, register
from fused_po.losses.value import value_loss

__all__ = [
    "HORIZONS",
    "Batch",
    "Loss",
    "Mixture",
    "covariance",
    "create",
    "grpo",
    "names",
    "pairwise",
    "pairwise_batch",
    "pairwise_sides",
    "policy",
    "reference_free",
    "register",
    "reinforce",
    "sft",
    "total",
    "unpaired",
    "value_loss",
]
