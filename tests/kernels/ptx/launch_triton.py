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
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from fused_po.kernels import configs, triton_blocks, triton_rows
from fused_po.kernels.contract import Coefficients, Span, Transform
from tests.kernels.ptx.launch_cuda import contiguous, inputs, output
from tests.kernels.ptx.machine import Counters, Geometry, Program, run
from tests.kernels.ptx.memory import Global, Region, put_back, region_of
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


def execute(
    launch: Launched,
    made: Compiled,
    regions: list[tuple[Region, Tensor]],
    seed: int,
    blocks: range | None = None,
    salt: int | None = None,
) -> Counters:
    """Run a launch, and put what it wrote into the tensors."""
    kernel = made.program.kernel
    given = [(type_, value) for type_, value, kept in zip(made.types, launch.arguments, made.kept, strict=True) if kept]
    # Triton appends pointers to memory of its own, which these kernels have none of
    assert len(kernel.parameters) - len(given) in (0, 1, 2), kernel.parameters
    parameters = bytearray(kernel.parameter_bytes)
    addresses = {id(tensor): region.base for region, tensor in regions}
    for (type_, value), parameter in zip(given, kernel.parameters, strict=False):
        if isinstance(value, Tensor):
            raw = struct.pack("<Q", addresses.get(id(value), value.data_ptr()))
        else:
            raw = struct.pack(PACKED[type_], value)
        assert len(raw) == parameter.size, parameter
        parameters[parameter.offset : parameter.offset + parameter.size] = raw
    grid = (*launch.grid, 1, 1)[:3]
    geometry = Geometry(grid, 32 * made.warps, 1, made.shared)
    memory = Global([region for region, _ in regions])
    counters = run(made.program, geometry, bytes(parameters), memory, seed, blocks, salt)
    for region, tensor in regions:
        if region.writable:
            put_back(region, tensor)
    return counters


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
        execute(launch, _changed(compiled(launch, 90), change), regions, seed)


def _changed(made: Compiled, change: Callable[[Kernel], None] | None) -> Compiled:
    if change is None:
        return made
    kernel = copy.deepcopy(made.program.kernel)
    change(kernel)
    return made._replace(program=Program(kernel))


class TritonPtx:
    """A backend, see ``fused_po.kernels.contract``.

    Args:
        architecture: for example 90.
        seed, salt: of the machine, see ``machine.run``.
        change: what to do to a kernel before it runs.
        last: run the blocks of as many of the last rows; the others need not be in memory. None runs all.

    Attributes:
        launches: what was launched, with what it did.
    """

    def __init__(
        self,
        architecture: int = 90,
        seed: int = 1,
        salt: int | None = None,
        change: Callable[[Kernel], None] | None = None,
        last: int | None = None,
    ) -> None:
        self.architecture, self.seed, self.salt = architecture, seed, salt
        self.change, self.last = change, last
        self.launches: list[tuple[Launched, Counters]] = []

    def unsupported(self, kernel: str, x: Tensor) -> str | None:
        if x.device.type != "cpu":
            return "the machine runs on the CPU"
        if x.stride(1) != 1 and x.shape[1] > 1:
            return "columns must be contiguous"
        return triton_rows.unsupported(kernel, x) if x.dtype.itemsize > 4 else None

    def _run(self, launches: list[Launched], regions: list[tuple[Region, Tensor]]) -> None:
        for launch in launches:
            made = _changed(compiled(launch, self.architecture), self.change)
            blocks = None if self.last is None else range(launch.grid[0] - self.last, launch.grid[0])
            self.launches.append((launch, execute(launch, made, regions, self.seed, blocks, self.salt)))

    def row_stats(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]
    ) -> Tensor:
        transform = contiguous(transform)
        with noted(triton_rows, self.architecture) as launches:
            partials = triton_rows.row_stats(x, labels, transform, span, outputs)
        if launches:
            self._run(launches, [*inputs(x, labels, transform, span, None, self.last), output("partials", partials)])
        return partials

    def row_softmax(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
    ) -> Tensor:
        transform = contiguous(transform)
        with noted(triton_rows, self.architecture) as launches:
            partials = triton_rows.row_softmax(x, labels, transform, span, outputs, out)
        if launches:
            self._run(launches, [*inputs(x, labels, transform, span, out, self.last), output("partials", partials)])
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
        transform, anchors = contiguous(transform), anchors.contiguous()
        coefficients = Coefficients(*(None if c is None else c.contiguous() for c in coefficients))
        with noted(triton_rows, self.architecture) as launches:
            triton_rows.row_grad(x, labels, transform, span, anchors, coefficients, out)
        if launches:
            given = [*inputs(x, labels, transform, span, out, self.last), (region_of("anchors", anchors), anchors)]
            names = zip(("c", "e", "l"), coefficients, strict=True)
            self._run(launches, given + [(region_of(name, c), c) for name, c in names if c is not None])
