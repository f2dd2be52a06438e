"""Axolotl's preference trainers on the fused path, by one line of its configuration::

plugins:
  - fused_po.trainers.axolotl.FusedPOPlugin
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

if find_spec("axolotl") is None:
    raise ImportError("fused_po.trainers.axolotl needs Axolotl, which is not installed: pip install axolotl")

from axolotl.integrations.base import BasePlugin

from fused_po.trainers import trl

__all__ = ["FusedPOPlugin"]


class FusedPOPlugin(BasePlugin):
    """Calls ``trl.enable()`` before the model of an ``rl:`` run is loaded.

    DPO, IPO, KTO, ORPO, SimPO and GRPO (``rl:``) then take log-probs as TRL's trainers do after ``trl.enable()``. Its
    asynchronous GRPO trainer has log-probs of its own, which stay.
    """

    def pre_model_load(self, cfg: Any) -> None:
        """Called by Axolotl once it has replaced what it replaces in TRL."""
        if cfg.rl:
            trl.enable()
