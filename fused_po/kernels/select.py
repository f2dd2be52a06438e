"""Which backend runs a kernel: a named one or, without a request, the first that supports the case."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType

from torch import Tensor

__all__ = ["BACKENDS", "select", "unsupported"]

# in the order of preference
BACKENDS = {
    "cuda": "fused_po.kernels.cuda",
    "triton": "fused_po.kernels.triton_rows",
    "reference": "fused_po.kernels.reference",
}

logger = logging.getLogger("fused_po")


def select(kernel: str, x: Tensor, requested: str | None) -> ModuleType:
    """The backend module that runs ``kernel`` on ``x``.

    Args:
        kernel: ``row_stats``, ``row_grad`` or ``row_softmax``.
        x: the raw head outputs (N, V); its device, dtype and strides decide.
        requested: a name from ``BACKENDS``; None takes ``FUSED_PO_BACKEND`` and, without that, the first that
            supports the case.

    Raises:
        ValueError: an unknown name, or a named backend that can't run the case (a named backend never falls back).
    """
    requested = requested or os.environ.get("FUSED_PO_BACKEND") or None
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"unknown backend {requested!r}: expected one of {', '.join(BACKENDS)}")
    for name in BACKENDS if requested is None else (requested,):
        # interpreted kernels are for tests, so CPU tensors get them only by name
        on_cpu_unasked = name == "triton" and x.device.type == "cpu" and requested is None
        reason = "CPU tensors" if on_cpu_unasked else unsupported(name, kernel, x)
        module, _ = _load(name)
        if reason is None and module is not None:
            _announce(name, x.device.type)
            return module
        if requested is not None:
            raise ValueError(f"backend {name!r} can't run {kernel}: {reason}")
    raise AssertionError("the reference backend supports every case")


def unsupported(name: str, kernel: str, x: Tensor) -> str | None:
    """Why a backend can't run a kernel on a tensor, in words; None if it can."""
    module, reason = _load(name)
    return reason if module is None else module.unsupported(kernel, x)


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(BACKENDS[name]), None
    except ImportError as error:
        return None, f"it can't be imported ({error})"


@cache
def _announce(name: str, device_type: str) -> None:
    logger.info("fused_po: %s kernels on %s", name, device_type)
