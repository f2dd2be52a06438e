"""Scratch buffers of a call, reused from chunk to chunk."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Workspace", "padded"]

# BLAS leaves its fast paths where a row does not start at a multiple of this, as in vocabularies of 32001 or 50257
ALIGNMENT = 128


def padded(width: int, dtype: torch.dtype) -> int:
    """Elements from one row of a buffer to the next: ``width``, and what aligns the rows."""
    step = ALIGNMENT // dtype.itemsize
    return -(-width // step) * step


class Workspace:
    """Uninitialised buffers by name; whoever asks for the same name next gets the same memory.

    Args:
        like: a tensor on their device.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """(rows, width) with aligned rows and contiguous columns."""
        stride = padded(width, dtype)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * stride:
            # free the old one first
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = self._like.new_empty(rows * stride, dtype=dtype)
        return buffer[: rows * stride].view(rows, stride)[:, :width]

    def free(self, name: str) -> None:
        """Give a buffer back."""
        self._buffers.pop(name, None)
