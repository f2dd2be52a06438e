"""The mode that sees each operation of a call on its way to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from fused_po.ledger.lines import asking_line
from fused_po.ledger.memory import Memory
from fused_po.ledger.operations import Operation
from fused_po.ledger.report import Ledger
from fused_po.ledger.rules import Cost, cost, tensors
from fused_po.ledger.triton_launches import intercepted

__all__ = ["autocast", "record"]

# operators of this package that are made of other operators
_COMPOSED = {"fused_po::token_stats", "fused_po::token_stats_backward"}


@contextmanager
def record(device: str = "meta") -> Iterator[Ledger]:
    """List what a program asks of a device.

    Operations of the host are not listed. Where the host would wait for a value that tensors on ``meta`` do not have,
    the wait is counted and the value taken for 1.

    Args:
        device: the type of the tensors that stand for the device's.

    Yields:
        the ledger, which fills as the program runs.
    """
    ledger = Ledger()
    recorder = _Recorder(ledger, device)
    # no Triton kernel runs on tensors without values
    with nullcontext() if device == "meta" else intercepted(recorder.note), recorder:
        yield ledger


@contextmanager
def autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """The autocast of a GPU, for operations that ask for it; ``torch.autocast`` turns itself off where there is none.

    Operations of torch on ``meta`` tensors do not follow it, those of this package do.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class _Recorder(TorchDispatchMode):
    def __init__(self, ledger: Ledger, device: str) -> None:
        super().__init__()
        self.ledger, self.device, self.memory = ledger, device, Memory()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _COMPOSED:
            # its fake kernel would not show what it is made of
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.memory.given(self._mine(*args, *kwargs.values()))
        result = self._run(func, args, kwargs)
        self.memory.made(self._mine(result))
        self.ledger.peak = self.memory.peak
        found = cost(func, args, kwargs, result, self.device)
        if found is not None and (found.launches or found.waits):
            self.note(func._schema.name, found)
        return result

    def note(self, name: str, found: Cost) -> None:
        """List an operation, asked for by the line that is running."""
        self.ledger.operations.append(Operation(name, asking_line(), *found))

    def _mine(self, *values: Any) -> list[Tensor]:
        return [tensor for tensor in tensors(*values) if tensor.device.type == self.device]

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.device == "meta" and self._mine(*args):
            answer = _ANSWERS.get(func._schema.name)
            found = None if answer is None else answer(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _copied(source: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "cpu":
        return None
    return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)


def _copied_into(target: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    return target.fill_(1) if target.device.type == "cpu" else None


def _nonzero(source: Tensor) -> Tensor:
    return torch.empty((source.numel(), source.ndim), dtype=torch.int64, device=source.device)


def _indexed(source: Tensor, indices: Sequence[Tensor | None], *values: Any, **kwargs: Any) -> Tensor | None:
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return None
    places: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            places += _nonzero(index).unbind(1)
        else:
            places.append(index)
    operator = torch.ops.aten.index_put_ if values else torch.ops.aten.index
    return operator(source, places, *values, **kwargs)


def _chosen(source: Tensor, mask: Tensor) -> Tensor:
    return source.new_empty(source.numel())


def _added(source: Tensor, a: Tensor, b: Tensor, *more: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    # torch 2.11 takes a dtype for a number there
    return out if more and isinstance(more[0], torch.dtype) else None


def _scalar(source: Tensor) -> bool | int | float:
    return torch.ones((), dtype=source.dtype).item()


# what stands for values that are not there: each is 1
_ANSWERS: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _scalar,
    "aten::is_nonzero": lambda source: True,
    "aten::equal": lambda one, other: True,
    "aten::nonzero": _nonzero,
    "aten::index": _indexed,
    "aten::index_put_": _indexed,
    "aten::masked_select": _chosen,
    "aten::addmm": _added,
    "aten::_to_copy": _copied,
    "aten::copy_": _copied_into,
}
