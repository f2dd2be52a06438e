"""A machine that executes the PTX of nvcc and Triton in numpy, for tests: see ``machine``; here are its backends."""

from __future__ import annotations

import sys

from fused_po.kernels.select import BACKENDS
from tests.kernels.fiber import GPUS, compiler
from tests.kernels.ptx.launch_cuda import CudaPtx, unavailable
from tests.kernels.ptx.launch_triton import TritonPtx

__all__ = ["register", "unavailable_backend"]


def register() -> list[str]:
    """Make the machine a backend that can be asked for by name: ``triton-ptx``, and ``cuda-ptx-<gpu>`` by path."""
    made = {"triton-ptx": TritonPtx(), **{f"cuda-ptx-{gpu}": CudaPtx(gpu) for gpu in GPUS}}
    for name, backend in made.items():
        module = f"{__name__}.{name}"
        # import finds what is here already
        sys.modules.setdefault(module, backend)  # type: ignore[arg-type]
        BACKENDS.setdefault(name, module)
    return list(made)


def unavailable_backend(name: str) -> str | None:
    """Why one of them can't run here, in words."""
    if not name.startswith("cuda-ptx"):
        return None
    return unavailable() or (None if compiler() else "the host code of the CUDA kernels needs a C++ compiler")
