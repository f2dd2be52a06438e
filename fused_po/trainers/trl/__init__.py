"""TRL's trainers on the fused path, by one call; nothing is changed by importing this.

::

    from fused_po.trainers import trl

    trl.enable()  # SFT, DPO, KTO, GRPO, RLOO, CPO, ORPO, OnlineDPO trainers of TRL >= 0.24
    trl.disable()

    with trl.enable():  # or for a while
        trainer.train()
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("trl") is None:
    raise ImportError(
        "fused_po.trainers.trl needs TRL, which is not installed: pip install 'trl>=1.15', or '.[trl]' in a clone of "
        "fused_po, on Python 3.11 or later"
    )

from fused_po.trainers.trl.hook import Enabled, calls, disable, enable, is_enabled

if TYPE_CHECKING:
    from fused_po.trainers.trl.dpo import FusedDPOTrainer
    from fused_po.trainers.trl.grpo import FusedGRPOTrainer
    from fused_po.trainers.trl.kto import FusedKTOTrainer

__all__ = [
    "Enabled",
    "FusedDPOTrainer",
    "FusedGRPOTrainer",
    "FusedKTOTrainer",
    "calls",
    "disable",
    "enable",
    "is_enabled",
]

# importing a trainer of TRL takes seconds, and enable() needs none
_TRAINERS = {"FusedDPOTrainer": "dpo", "FusedGRPOTrainer": "grpo", "FusedKTOTrainer": "kto"}


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TRAINERS[name]}"), name)
