"""Preference losses: each one dataclass, a pure function of per-token statistics. ``create(name, **hyperparameters)``
makes one.
"""

from fused_po.losses import pairwise, policy, unpaired
from fused_po.losses.batch import Batch
from fused_po.losses.contract import HORIZONS, Loss, create, names, register, total

__all__ = ["HORIZONS", "Batch", "Loss", "create", "names", "pairwise", "policy", "register", "total", "unpaired"]
