"""Which device the tensors of a call stand for: those on ``meta`` have no values, and are planned as a GPU's would be.

That is how a call is priced on paper (``fused_po.ledger``): it takes every step that it would take on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["has_values", "stands_for", "without_autocast"]


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to look at."""
    return tensor.device.type != "meta"


def stands_for(tensor: Tensor) -> str:
    """The type of the device that a call with this tensor is planned for."""
    return tensor.device.type if has_values(tensor) else "cuda"


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without the autocast of the tensor's device; none reaches tensors without values."""
    return torch.autocast(tensor.device.type, enabled=False) if has_values(tensor) else nullcontext()
