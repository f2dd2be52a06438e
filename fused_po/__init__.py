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

# where each public name is defined; None: it is a submodule
_HOMES = {
    "LossOutput": "fused_po.ops",
    "Plan": "fused_po.ops",
    "Split": "fused_po.splits",
    "SplitGradients": "fused_po.ops",
    "Stats": "fused_po.stats",
    "advantages": None,
    "linear_loss": "fused_po.ops",
    "linear_token_stats": "fused_po.ops",
    "losses": None,
    "make_plan": "fused_po.ops",
    "splits": None,
    "stats_loss": "fused_po.ops",
    "take_apart": "fused_po.trainers.model",
    "token_stats": "fused_po.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"{__name__}.{name}") if home is None else getattr(import_module(home), name)
    # found without this function from now on
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
