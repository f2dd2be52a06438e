"""Which device the tensors of a call stand for: those on ``meta`` have no values, and are planned as a GPU's would be.

That is how a call is priced on paper (``fused_po.ledger``): it takes every step that it would take on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["has_values", "planned_for", "stands_for", "without_autocast"]

# what tensors without values stand for
_PLANNED: ContextVar[str] = ContextVar("_PLANNED", default="cuda")


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to look at."""
    return tensor.device.type != "meta"


def stands_for(tensor: Tensor) -> str:
    """The type of the device that a call with this tensor is planned for."""
    return tensor.device.type if has_values(tensor) else _PLANNED.get()


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Calls within that have shapes only are planned for a type of device; else for a GPU."""
    token = _PLANNED.set(device)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without the autocast of the tensor's device; none reaches tensors without values."""
    return torch.autocast(tensor.device.type, enabled=False) if has_values(tensor) else nullcontext()
