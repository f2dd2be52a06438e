"""Measurements of what a call costs and of what a loss does to a model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fused_po.diagnostics.alignment import Alignment, by_layer, gradient_alignment
from fused_po.diagnostics.checkpoints import alignment_over_checkpoints, check_checkpoints
from fused_po.diagnostics.dynamics import Dynamics, Histogram, learning_dynamics
from fused_po.diagnostics.examples import Examples
from fused_po.diagnostics.memory import peak_memory
from fused_po.diagnostics.paper import AlignmentPrediction, predict_alignment
from fused_po.diagnostics.prediction import MemoryPrediction, largest_length, predict_memory
from fused_po.diagnostics.rollouts import Rollout, RolloutDump, read_rollouts, rollout_examples, write_rollouts

if TYPE_CHECKING:
    from fused_po.diagnostics.callback import GradientAlignmentCallback

__all__ = [
    "Alignment",
    "AlignmentPrediction",
    "Dynamics",
    "Examples",
    "GradientAlignmentCallback",
    "Histogram",
    "MemoryPrediction",
    "Rollout",
    "RolloutDump",
    "alignment_over_checkpoints",
    "by_layer",
    "check_checkpoints",
    "gradient_alignment",
    "largest_length",
    "learning_dynamics",
    "peak_memory",
    "predict_alignment",
    "predict_memory",
    "read_rollouts",
    "rollout_examples",
    "write_rollouts",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and nothing else here needs it at once
    if name != "GradientAlignmentCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("fused_po.diagnostics.callback").GradientAlignmentCallback
