"""The Triton kernels as a backend: the wrappers of ``triton_rows`` as they are, with launches that the machine runs."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from fused_po.kernels import configs, triton_blocks, triton_rows
from tests.kernels.ptx.backend import PtxBackend, Ready, run_ready
from tests.kernels.ptx.machine import Geometry, Program
from tests.kernels.ptx.memory import region_of
from tests.kernels.ptx.parse import Kernel, Module

__all__ = ["Compiled", "Launched", "TritonPtx", "compiled", "noted", "run_products"]

ROOT = Path(__file__).resolve().parents[3]
PACKED = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


class Compiled(NamedTuple):
    """A kernel for one kind of launch.

    Attributes:
        kept: which arguments are parameters; the others became constants.
        types: as Triton names them.
    """

    program: Program
    shared: int
    warps: int
    kept: list[bool]
    types: list[str]


class Launched(NamedTuple):
    """A launch as a wrapper makes it: ``kernel[grid](*arguments, **options)``."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@functools.cache
def _compiler() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    user = os.getuid() if hasattr(os, "getuid") else 0
    # a cache of its own, that another process may use too
    environment["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"fused_po_ptx_{user}" / "triton")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.ptx.compile_triton"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


@functools.cache
def _program(ptx: str, name: str) -> Program:
    return Program(Module(ptx).kernel(name))


def compiled(launch: Launched, architecture: int) -> Compiled:
    """What the launch would compile, taken from the compiler's process."""
    process = _compiler()
    assert process.stdin is not None and process.stdout is not None
    arguments = [
        {"dtype": str(value.dtype).removeprefix("torch."), "alignment": value.data_ptr() % 16}
        if isinstance(value, Tensor)
        else value
        for value in launch.arguments
    ]
    request = {"kernel": launch.kernel, "architecture": architecture, "arguments": arguments, "options": launch.options}
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, "the compiler ended; what it wrote stands above"
    found = json.loads(line)
    return Compiled(
        _program(found["ptx"], found["name"]), found["shared"], found["warps"], found["kept"], found["types"]
    )


@contextmanager
def noted(module: Any, architecture: int) -> Iterator[list[Launched]]:
    """The launches of a module's kernels within, instead of being run; block sizes are those of the architecture."""
    found: list[Launched] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: found.append(Launched(self.name, grid, arguments, options))

    names = [name for name in dir(module) if name.endswith("_kernel")]
    with (
        mock.patch.multiple(module, **{name: Kernel(name) for name in names}),
        mock.patch.object(configs, "architecture", lambda device: f"sm_{architecture}"),
        # these launches are compiled
        mock.patch.object(triton_rows, "INTERPRETED", False),
    ):
        yield found


def ready(launch: Launched, architecture: int, change: Callable[[Kernel], None] | None) -> Ready:
    """A launch with the parameters that its compiled kernel takes."""
    made = compiled(launch, architecture)
    program = made.program
    if change is not None:
        kernel = copy.deepcopy(program.kernel)
        change(kernel)
        program = Program(kernel)
    arguments = zip(made.types, launch.arguments, made.kept, strict=True)
    given = [(type_, value) for type_, value, kept in arguments if kept]
    parameters = bytearray(program.kernel.parameter_bytes)
    # Triton appends pointers to memory of its own, which these kernels have none of
    assert len(program.kernel.parameters) - len(given) in (0, 1, 2), program.kernel.parameters
    for (type_, value), parameter in zip(given, program.kernel.parameters, strict=False):
        is_tensor = isinstance(value, Tensor)
        raw = struct.pack("<Q", value.data_ptr()) if is_tensor else struct.pack(PACKED[type_], value)
        assert len(raw) == parameter.size, parameter
        parameters[parameter.offset : parameter.offset + parameter.size] = raw
    geometry = Geometry((*launch.grid, 1, 1)[:3], 32 * made.warps, 1, made.shared)
    return Ready(program, geometry, bytes(parameters))


def run_products(
    call: Callable[[], None], output: Tensor, seed: int = 1, change: Callable[[Kernel], None] | None = None
) -> None:
    """What ``call`` launches of ``triton_blocks`` on sm_90: its tensors may be read, and the output written."""
    with noted(triton_blocks, 90) as launches:
        call()
    for launch in launches:
        regions = []
        for number, value in enumerate(launch.arguments):
            if isinstance(value, Tensor):
                columns = None if value.is_contiguous() else value.shape[1]
                written = int(value.data_ptr() == output.data_ptr())
                regions.append((region_of(str(number), value, columns=columns, written=written), value))
        run_ready(ready(launch, 90, change), regions, seed)


class TritonPtx(PtxBackend):
    """The kernels of Triton.

    Args:
        architecture: for example 90.
        options: see ``PtxBackend``.
    """

    def __init__(self, architecture: int = 90, seed: int = 1, **options: Any) -> None:
        super().__init__(triton_rows, seed, **options)
        self.architecture = architecture

    def unsupported(self, kernel: str, x: Tensor) -> str | None:
        if x.device.type != "cpu":
            return "the machine runs on the CPU"
        if x.stride(1) != 1 and x.shape[1] > 1:
            return "columns must be contiguous"
        return triton_rows.unsupported(kernel, x) if x.dtype.itemsize > 4 else None

    def noted(self) -> AbstractContextManager[list[Any]]:
        return noted(triton_rows, self.architecture)

    def ready(self, kernel: str, launch: Launched) -> Ready:
        return ready(launch, self.architecture, self.change)
