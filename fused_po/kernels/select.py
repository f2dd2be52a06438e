"""Which backend runs a kernel: a named one or, without a request, the first that supports the case."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from functools import cache
from types import ModuleType

from torch import Tensor

__all__ = ["BACKENDS", "requested_backend", "select", "unsupported"]

# in the order of preference
BACKENDS = {
    "cuda": f"{__package__}.cuda",
    "triton": f"{__package__}.triton_rows",
    "reference": f"{__package__}.reference",
}

logger = logging.getLogger("fused_po")


def select(kernel: str, x: Tensor, requested: str | None, backends: Mapping[str, str] | None = None) -> ModuleType:
    """The backend module that runs ``kernel`` on ``x``.

    Args:
        kernel: ``row_stats``, ``row_grad`` or ``row_softmax``, or one of ``backends``.
        x: the raw head outputs (N, V); its device, dtype and strides decide.
        requested: a name from ``BACKENDS``; None takes ``FUSED_PO_BACKEND`` and, without that, the first that
            supports the case.
        backends: their modules by name in the order of preference; None takes ``BACKENDS``.

    Raises:
        ValueError: an unknown name, or a named backend that can't run the case (a named backend never falls back).
    """
    requested = requested_backend(requested)
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}: expected one of {', '.join(BACKENDS)}")
    modules = BACKENDS if backends is None else backends
    if requested is not None and requested not in modules:
        raise ValueError(f"backend {requested!r} has no {kernel}: leave the choice, or take {' or '.join(modules)}")
    for name in modules if requested is None else (requested,):
        # interpreted kernels are for tests, so CPU tensors get them only by name
        on_cpu_unasked = name == "triton" and x.device.type == "cpu" and requested is None
        reason = "CPU tensors" if on_cpu_unasked else unsupported(name, kernel, x, modules)
        module, _ = _load(modules[name])
        if reason is None and module is not None:
            _announce(name, x.device.type)
            return module
        if requested is not None:
            raise ValueError(f"backend {name!r} can't run {kernel}: {reason}")
    raise AssertionError("the reference backend supports every case")


def requested_backend(requested: str | None) -> str | None:
    """The name that was asked for, by argument or by ``FUSED_PO_BACKEND``; None: no name was."""
    return requested or os.environ.get("FUSED_PO_BACKEND") or None


def unsupported(name: str, kernel: str, x: Tensor, backends: Mapping[str, str] | None = None) -> str | None:
    """Why a backend can't run a kernel on a tensor, in words; None if it can."""
    module, reason = _load((BACKENDS if backends is None else backends)[name])
    return reason if module is None else module.unsupported(kernel, x)


@cache
def _load(path: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(path), None
    except ImportError as error:
        return None, f"it can't be imported ({error})"


@cache
def _announce(name: str, device_type: str) -> None:
    logger.info("fused_po: %s kernels on %s", name, device_type)
