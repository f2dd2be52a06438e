"""What both backends of the machine share: the launches of a wrapper are noted, given their memory, and run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from fused_po.kernels.contract import Coefficients, Span, Transform
from tests.kernels.ptx.machine import Counters, Geometry, Program, run
from tests.kernels.ptx.memory import Global, Region, put_back, region_of
from tests.kernels.ptx.parse import Kernel

__all__ = ["PtxBackend", "Ready", "Regions", "run_ready"]

Regions = list[tuple[Region, Tensor]]


class Ready(NamedTuple):
    """A launch that can run."""

    program: Program
    geometry: Geometry
    parameters: bytes


def run_ready(
    ready: Ready, regions: Regions, seed: int, blocks: range | None = None, salt: int | None = None
) -> Counters:
    """Run a launch, and put what it wrote into the tensors."""
    memory = Global([region for region, _ in regions])
    counters = run(*ready, memory, seed, blocks, salt)
    for region, tensor in regions:
        if region.writable:
            put_back(region, tensor)
    return counters


class PtxBackend:
    """A backend, see ``fused_po.kernels.contract``; ``noted`` and ``ready`` say where its launches come from.

    Args:
        inner: the wrappers, which launch.
        seed, salt: of the machine, see ``machine.run``.
        change: what to do to a kernel before it runs.
        last: run the blocks of as many of the last rows; the others need not be in memory. None runs all.

    Attributes:
        launches: what was launched, with what it did.
    """

    def __init__(
        self,
        inner: Any,
        seed: int = 1,
        salt: int | None = None,
        change: Callable[[Kernel], None] | None = None,
        last: int | None = None,
    ) -> None:
        self.inner, self.seed, self.salt, self.change, self.last = inner, seed, salt, change, last
        self.launches: list[tuple[Any, Counters]] = []

    def noted(self) -> AbstractContextManager[list[Any]]:
        """The launches within, instead of being run."""
        raise NotImplementedError

    def ready(self, kernel: str, launch: Any) -> Ready:
        """One of them, with ``change`` made."""
        raise NotImplementedError

    def _run(self, kernel: str, launches: list[Any], regions: Regions) -> None:
        for launch in launches:
            ready = self.ready(kernel, launch)
            blocks = None
            if self.last is not None:
                total, rows = ready.geometry.grid[0], regions[0][0].rows
                blocks = range(total // rows * (rows - self.last), total)
            self.launches.append((launch, run_ready(ready, regions, self.seed, blocks, self.salt)))

    def row_stats(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]
    ) -> Tensor:
        with self.noted() as launches:
            partials = self.inner.row_stats(x, labels, transform, span, outputs)
        given = [*self._inputs(x, labels, transform, span, None), whole("partials", partials, written=1)]
        self._run("row_stats", launches, given)
        return partials

    def row_softmax(
        self, x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
    ) -> Tensor:
        with self.noted() as launches:
            partials = self.inner.row_softmax(x, labels, transform, span, outputs, out)
        given = [*self._inputs(x, labels, transform, span, out), whole("partials", partials, written=1)]
        self._run("row_softmax", launches, given)
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
        with self.noted() as launches:
            self.inner.row_grad(x, labels, transform, span, anchors, coefficients, out)
        given = [*self._inputs(x, labels, transform, span, out), whole("anchors", anchors)]
        names = zip(("c", "e", "l"), coefficients, strict=True)
        self._run("row_grad", launches, given + [whole(name, c) for name, c in names if c is not None])

    def _inputs(self, x: Tensor, labels: Tensor, transform: Transform, span: Span, out: Tensor | None) -> Regions:
        """Memory of the logits, of the output if there is one, and of what comes with each row."""
        if not len(x):
            return []
        in_place = out is not None and out.data_ptr() == x.data_ptr()
        found = [self._matrix("x", x, span.width, x.shape[1] if in_place else 0)]
        if out is not None and not in_place:
            found.append(self._matrix("out", out, 0, out.shape[1]))
        found.append(whole("labels", labels))
        if transform.temperatures is not None:
            found.append(whole("temperatures", transform.temperatures))
        return found

    def _matrix(self, name: str, tensor: Tensor, columns: int, written: int) -> tuple[Region, Tensor]:
        count = len(tensor)
        kept = tensor[count - (self.last or count) :]
        return region_of(name, kept, columns=columns, written=written, address=tensor.data_ptr(), rows=count), kept


def whole(name: str, tensor: Tensor, written: int = 0) -> tuple[Region, Tensor]:
    """A tensor without gaps."""
    return region_of(name, tensor, written=written), tensor
