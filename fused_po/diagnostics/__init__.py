"""Measurements of what a call costs and of what a loss does to a model."""

from fused_po.diagnostics.alignment import Alignment, by_layer, gradient_alignment
from fused_po.diagnostics.checkpoints import alignment_over_checkpoints, check_checkpoints
from fused_po.diagnostics.dynamics import Dynamics, Histogram, learning_dynamics
from fused_po.diagnostics.memory import peak_memory
from fused_po.diagnostics.parts import Examples

__all__ = [
    "Alignment",
    "Dynamics",
    "Examples",
    "Histogram",
    "alignment_over_checkpoints",
    "by_layer",
    "check_checkpoints",
    "gradient_alignment",
    "learning_dynamics",
    "peak_memory",
]
