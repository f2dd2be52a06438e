"""Preference losses of language models in one pass over the logits, at any vocabulary size.

A public name imports what it needs when it is first used: ``import fused_po`` itself loads neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_po import advantages, losses, splits
    from fused_po.ops import (
        LossOutput,
        Plan,
        SplitGradients,
        linear_loss,
        linear_token_stats,
        make_plan,
        stats_loss,
        token_stats,
    )
    from fused_po.splits import Split
    from fused_po.stats import Stats
    from fused_po.trainers.model import take_apart

__all__ = [
    "LossOutput",
    "Plan",
    "Split",
    "SplitGradients",
    "Stats",
    "__version__",
    "advantages",
    "linear_loss",
    "linear_token_stats",
    "losses",
    "make_plan",
    "splits",
    "stats_loss",
    "take_apart",
    "token_stats",
]

__version__ = "0.1.0"

# the submodule in which each public name is defined; None: it is one
_HOMES = {
    "LossOutput": "ops",
    "Plan": "ops",
    "Split": "splits",
    "SplitGradients": "ops",
    "Stats": "stats",
    "advantages": None,
    "linear_loss": "ops",
    "linear_token_stats": "ops",
    "losses": None,
    "make_plan": "ops",
    "splits": None,
    "stats_loss": "ops",
    "take_apart": "trainers.model",
    "token_stats": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    module = import_module(f"{__name__}.{home or name}")
    value = module if home is None else getattr(module, name)
    # found without this function from now on
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
