"""The CUDA kernels on the CPU: the sources of ``csrc/`` built as C++, each CUDA thread a fiber, as a backend for tests.

``GPUS`` names made-up devices, one for each path that a row can take.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pybind11
import torch
from filelock import FileLock
from torch import Tensor

from fused_po.kernels.contract import PARTIALS, Coefficients, Span, Transform
from fused_po.kernels.select import BACKENDS
from fused_po.stats import STATISTICS

__all__ = ["GPUS", "Fibers", "Plant", "build", "compiler", "register"]

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# see launch_fibers.h
GPUS = {"streamed": 0, "resident": 1, "cluster": 2}
# a build without code for the GPU, and a GPU without room for larger clusters
ODD_GPUS = {"older-code": 3, "crowded": 4}


def register() -> list[str]:
    """Make each of ``GPUS`` a backend that can be asked for by name, as ``fibers-<gpu>``; built on first use."""
    for gpu in GPUS:
        module = f"{__name__}.{gpu}"
        # import finds what is here already
        sys.modules.setdefault(module, Fibers(gpu))  # type: ignore[arg-type]
        BACKENDS.setdefault(f"fibers-{gpu}", module)
    return [f"fibers-{gpu}" for gpu in GPUS]


@functools.cache
def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one that knows half precision."""
    name = os.environ.get("CXX", "g++")
    source = "_Float16 half; int main() { return half != 0; }"
    try:
        command = [name, "-x", "c++", "-fsyntax-only", "-"]
        return name if subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0 else None
    except OSError:
        return None


class Plant(NamedTuple):
    """A bug for tests to find: in a file of ``csrc/``, ``new`` in place of ``old``, with ``ON`` true while it is on."""

    file: str
    old: str
    new: str


@functools.cache
def build(plants: tuple[Plant, ...] = ()) -> tuple[ModuleType, ctypes.CDLL]:
    """Compile and load the module, or take it from the folder of builds if its sources have not changed."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(CSRC.iterdir())}
    for number, plant in enumerate(plants, 1):
        assert texts[plant.file].count(plant.old) == 1, plant
        new = plant.new.replace("ON", f"(fused_po::fiber::planted == {number})")
        texts[plant.file] = texts[plant.file].replace(plant.old, new)
    texts |= {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(HERE.glob("*.*"))
        if path.suffix in {".h", ".cpp"}
    }
    digest = hashlib.sha256("\0".join([*FLAGS, sys.version, *texts, *texts.values()]).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"fused_po_fibers_{user}" / digest
    # modules of one name would be taken for one another
    name = f"fibers_{digest}"
    module = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    # of two processes one builds
    with FileLock(folder / "lock"):
        if not module.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = _compile(name, texts, Path(scratch))
                # whole or not at all
                os.replace(made, module)
    spec = importlib.util.spec_from_file_location(name, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded, ctypes.CDLL(str(module))


def _compile(name: str, texts: dict[str, str], folder: Path) -> Path:
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    units = [folder / file for file in texts if file.endswith((".cu", ".cpp")) and file != "runtime.cu"]
    includes = [sysconfig.get_path("include"), pybind11.get_include(), str(folder)]
    options = [*FLAGS, "-DFUSED_PO_FIBERS", f"-DFUSED_PO_MODULE={name}", *(f"-I{path}" for path in includes)]
    objects = [str(unit.with_suffix(".o")) for unit in units]
    commands = [
        [str(compiler()), *options, "-x", "c++", "-c", str(unit), "-o", target]
        for unit, target in zip(units, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    made = folder / "fibers.so"
    _run([str(compiler()), "-shared", "-o", str(made), *objects])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


class Fibers:
    """A backend, see ``fused_po.kernels.contract``: the kernels on one of ``GPUS``, threads shuffled by ``seed``.

    Of ``plants``, the bugs built in, the one numbered ``planted`` from 1 on is active.
    """

    def __init__(self, gpu: str, seed: int = 1, plants: tuple[Plant, ...] = (), planted: int = 0) -> None:
        self.device = (GPUS | ODD_GPUS)[gpu]
        self.seed, self.plants, self.planted = seed, plants, planted

    def unsupported(self, kernel: str, x: Tensor) -> str | None:
        if x.dtype not in CODES:
            return f"{x.dtype} is left to the reference"
        return None if x.device.type == "cpu" else "fibers run on the CPU"

    @property
    def module(self) -> ModuleType:
        return build(self.plants)[0]

    @property
    def last_launch(self) -> dict[str, int]:
        """Blocks, threads of a block, blocks of a cluster and bytes of shared memory of the last launch; questions that
        the host side has asked so far about what fits.
        """
        return {name: int(value) for name, value in self.module.build_info().items()}

    def row_stats(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]
    ) -> Tensor:
        partials = _partials(x)
        common, alive = _common(labels, transform, span)
        self._configure()
        self.module.row_stats(*_rows(x), *common, _mask(outputs), partials.data_ptr(), self.device, 0)
        del alive
        return partials

    def row_softmax(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
    ) -> Tensor:
        partials = _partials(x)
        common, alive = _common(labels, transform, span)
        self._configure()
        self.module.row_softmax(*_rows(x), *_out(out), *common, _mask(outputs), partials.data_ptr(), self.device, 0)
        del alive
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
        common, alive = _common(labels, transform, span)
        anchors = anchors.contiguous()
        given = [None if c is None else c.contiguous() for c in coefficients]
        pointers = (0 if c is None else c.data_ptr() for c in given)
        self._configure()
        self.module.row_grad(*_rows(x), *_out(out), *common, anchors.data_ptr(), *pointers, self.device, 0)
        del alive

    def _configure(self) -> None:
        build(self.plants)[1].fused_po_configure(ctypes.c_ulonglong(self.seed), self.planted)


def _partials(x: Tensor) -> Tensor:
    return torch.full((len(PARTIALS), x.shape[0]), torch.nan)


def _rows(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), CODES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def _out(out: Tensor) -> tuple[int, ...]:
    return out.data_ptr(), CODES[out.dtype], out.stride(0)


def _common(labels: Tensor, transform: Transform, span: Span) -> tuple[tuple[float, ...], list[Tensor]]:
    """Arguments from labels to span, and the tensors that must outlive the call."""
    labels = labels.contiguous()
    alive = [labels]
    temperatures = 0
    if transform.temperatures is not None:
        alive.append(transform.temperatures.contiguous())
        temperatures = alive[1].data_ptr()
    numbers = (transform.temperature, transform.softcap or 0.0, transform.logit_scale)
    return (labels.data_ptr(), temperatures, *numbers, *span), alive


def _mask(outputs: tuple[str, ...]) -> int:
    return sum(1 << STATISTICS.index(name) for name in outputs)
