"""Measurements of what a call costs and of what a loss does to a model."""

from fused_po.diagnostics.alignment import Alignment, Examples, by_layer, gradient_alignment
from fused_po.diagnostics.memory import peak_memory

__all__ = ["Alignment", "Examples", "by_layer", "gradient_alignment", "peak_memory"]
