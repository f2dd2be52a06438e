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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_po.kernels.build import BuildError, Toolkit
from fused_po.kernels.contract import Coefficients, Span, Transform
from fused_po.testing import KernelProblem
from tests.kernels.fiber import CSRC, Fibers, build
from tests.kernels.ptx.machine import Counters, Geometry, Program, run
from tests.kernels.ptx.memory import Global, Region, put_back, region_of
from tests.kernels.ptx.parse import Kernel, Module

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

    with ThreadPoolExecutor(os.cpu_count()) as pool:
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


class CudaPtx(Fibers):
    """A backend, see ``fused_po.kernels.contract``.

    Args:
        gpu: one of ``fiber.GPUS``, whose plans are made.
        architecture: of the PTX.
        seed, salt: of the machine, see ``machine.run``.
        change: what to do to a kernel before it runs.
        last: run the blocks of as many of the last rows; the others need not be in memory. None runs all.

    Attributes:
        launches: what was launched, with what it did.
    """

    def __init__(
        self,
        gpu: str,
        architecture: str = "90a",
        seed: int = 1,
        salt: int | None = None,
        change: Callable[[Kernel], None] | None = None,
        last: int | None = None,
    ) -> None:
        super().__init__(gpu)
        self.architecture, self.seed, self.salt = architecture, seed, salt
        self.change, self.last = change, last
        self.launches: list[tuple[Launch, Counters]] = []

    def unsupported(self, kernel: str, x: Tensor) -> str | None:
        return unavailable() or super().unsupported(kernel, x)

    def program(self, file: str, launch: Launch) -> Program:
        if self.change is None:
            return program(self.architecture, file, launch.kernel)
        kernel = modules(self.architecture)[file].fresh_kernel(launch.kernel)
        self.change(kernel)
        return Program(kernel)

    def _run(self, file: str, launch: Launch, regions: list[tuple[Region, Tensor]]) -> None:
        memory = Global([region for region, _ in regions])
        made = self.program(file, launch)
        blocks = None
        if self.last is not None:
            total, rows = launch.geometry.grid[0], regions[0][0].rows
            blocks = range(total // rows * (rows - self.last), total)
        counters = run(made, launch.geometry, launch.parameters, memory, self.seed, blocks, self.salt)
        for region, tensor in regions:
            if region.writable:
                put_back(region, tensor)
        self.launches.append((launch, counters))

    def row_stats(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]
    ) -> Tensor:
        labels, transform = labels.contiguous(), contiguous(transform)
        with _noted() as noted:
            partials = super().row_stats(x, labels, transform, span, outputs)
        if x.shape[0]:
            given = [*inputs(x, labels, transform, span, None, self.last), output("partials", partials)]
            self._run("row_stats", noted[0], given)
        return partials

    def row_softmax(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
    ) -> Tensor:
        labels, transform = labels.contiguous(), contiguous(transform)
        with _noted() as noted:
            partials = super().row_softmax(x, labels, transform, span, outputs, out)
        if x.shape[0]:
            given = [*inputs(x, labels, transform, span, out, self.last), output("partials", partials)]
            self._run("row_softmax", noted[0], given)
        return partials

    def row_grad(
        self,
        x: Tensor,
        labels: Tensor,
        transform: Transform,
        span: Span,
        anchors: Tensor,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        labels, transform, anchors = labels.contiguous(), contiguous(transform), anchors.contiguous()
        coefficients = Coefficients(*(None if c is None else c.contiguous() for c in coefficients))
        with _noted() as noted:
            super().row_grad(x, labels, transform, span, anchors, coefficients, out)
        if x.shape[0]:
            given = [*inputs(x, labels, transform, span, out, self.last), (region_of("anchors", anchors), anchors)]
            names = zip(("c", "e", "l"), coefficients, strict=True)
            given += [(region_of(name, c), c) for name, c in names if c is not None]
            self._run("row_grad", noted[0], given)


def contiguous(transform: Transform) -> Transform:
    if transform.temperatures is None:
        return transform
    return Transform(
        transform.temperature, transform.temperatures.contiguous(), transform.softcap, transform.logit_scale
    )


def inputs(
    x: Tensor, labels: Tensor, transform: Transform, span: Span, out: Tensor | None, last: int | None
) -> list[tuple[Region, Tensor]]:
    """Memory of the logits, of the output if there is one, and of what comes with each row; of the last rows only."""
    in_place = out is not None and out.data_ptr() == x.data_ptr()
    count = len(x) if last is None else last

    def matrix(name: str, tensor: Tensor, columns: int, written: int) -> tuple[Region, Tensor]:
        kept = tensor[len(x) - count :]
        place = {"address": tensor.data_ptr(), "rows": len(x)}
        return region_of(name, kept, columns=columns, written=written, **place), kept

    found = [matrix("x", x, span.width, x.shape[1] if in_place else 0)]
    if out is not None and not in_place:
        found.append(matrix("out", out, 0, out.shape[1]))
    found.append((region_of("labels", labels), labels))
    if transform.temperatures is not None:
        found.append((region_of("temperatures", transform.temperatures), transform.temperatures))
    return found


def output(name: str, tensor: Tensor) -> tuple[Region, Tensor]:
    return region_of(name, tensor, written=1), tensor
