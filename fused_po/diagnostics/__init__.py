"""Measurements of what a call costs and of what a loss does to a model."""

from fused_po.diagnostics.memory import peak_memory

__all__ = ["peak_memory"]
