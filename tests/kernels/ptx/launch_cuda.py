"""The CUDA kernels as a backend: PTX of nvcc, launched as the extension's own host code says.

Grid, cluster, shared memory and the bytes of the arguments come from `csrc/` as it is: the module of the fiber executor
holds that host code, and notes a launch instead of running it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from fused_po.kernels.build import BuildError, Toolkit
from fused_po.kernels.contract import Coefficients, Span
from fused_po.testing import KernelProblem
from tests.kernels.fiber import CSRC, Fibers, build
from tests.kernels.ptx.backend import PtxBackend, Ready
from tests.kernels.ptx.machine import Geometry, Program
from tests.kernels.ptx.parse import Module

__all__ = ["CudaPtx", "modules", "noted_kernels", "unavailable"]

KERNELS = ("row_stats", "row_softmax", "row_grad")
FLAGS = ("-ptx", "-O3", "-std=c++17")


class Launch(NamedTuple):
    """A launch as the host code wants it."""

    kernel: str
    geometry: Geometry
    parameters: bytes


@functools.cache
def unavailable() -> str | None:
    """Why there is no PTX of the CUDA kernels, in words."""
    try:
        Toolkit.find()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def modules(architecture: str = "90a") -> dict[str, Module]:
    """The PTX of each source file with kernels, compiled or taken from the folder of builds."""
    toolkit = Toolkit.find()
    texts = [path.read_bytes() for path in sorted(CSRC.iterdir())]
    key = hashlib.sha256(b"\0".join([toolkit.version.encode(), *(flag.encode() for flag in FLAGS), *texts]))
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"fused_po_ptx_{user}" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(name: str) -> Module:
        target = folder / f"{name}.{architecture}.ptx"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / target.name
                source = str(CSRC / f"{name}.cu")
                command = [str(toolkit.nvcc), *FLAGS, f"-arch=compute_{architecture}", source, "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                os.replace(made, target)
        return Module(target.read_text(encoding="utf-8"))

    # of two processes one compiles
    with FileLock(folder / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KERNELS, pool.map(compiled, KERNELS), strict=True))


@functools.cache
def program(architecture: str, file: str, kernel: str) -> Program:
    return Program(modules(architecture)[file].kernel(kernel))


@contextmanager
def _noted() -> Iterator[list[Launch]]:
    """The launches within, instead of being run."""
    module, library = build()
    library.fused_po_noted_kernel.restype = ctypes.c_char_p
    library.fused_po_noted_arguments.restype = ctypes.c_void_p
    found: list[Launch] = []
    library.fused_po_note(1)
    try:
        yield found
    finally:
        library.fused_po_note(0)
    if not library.fused_po_noted_kernel():
        return
    size = library.fused_po_argument_bytes()
    plan = {name: int(value) for name, value in module.build_info().items()}
    geometry = Geometry((plan["blocks"], 1, 1), plan["threads"], plan["cluster"], plan["shared"])
    kernel = library.fused_po_noted_kernel().decode()
    found.append(Launch(kernel, geometry, ctypes.string_at(library.fused_po_noted_arguments(), size)))


def noted_kernels(gpu: str, kernel: str, problem: KernelProblem, outputs: tuple[str, ...], entropy: bool) -> set[str]:
    """The instance that the host code launches, which is not run."""
    p, fibers, span = problem, Fibers(gpu), Span(0, problem.vocab_size)
    with _noted() as noted:
        if kernel == "row_stats":
            fibers.row_stats(p.x, p.labels, p.transform, span, outputs)
        elif kernel == "row_softmax":
            fibers.row_softmax(p.x, p.labels, p.transform, span, outputs, p.x)
        else:
            c = p.x.new_zeros(len(p.x), dtype=torch.float32)
            coefficients = Coefficients(c, c if entropy else None)
            fibers.row_grad(p.x, p.labels, p.transform, span, c.new_zeros(4, len(c)), coefficients, p.x)
    return {launch.kernel for launch in noted}


class CudaPtx(PtxBackend):
    """The kernels of nvcc.

    Args:
        gpu: one of ``fiber.GPUS``, whose plans are made.
        architecture: of the PTX.
        options: see ``PtxBackend``.
    """

    def __init__(self, gpu: str, architecture: str = "90a", **options: Any) -> None:
        super().__init__(Fibers(gpu), **options)
        self.architecture = architecture

    def unsupported(self, kernel: str, x: Tensor) -> str | None:
        return unavailable() or self.inner.unsupported(kernel, x)

    def noted(self) -> AbstractContextManager[list[Any]]:
        return _noted()

    def ready(self, kernel: str, launch: Launch) -> Ready:
        made = program(self.architecture, kernel, launch.kernel)
        if self.change is not None:
            fresh = modules(self.architecture)[kernel].fresh_kernel(launch.kernel)
            self.change(fresh)
            made = Program(fresh)
        return Ready(made, launch.geometry, launch.parameters)
