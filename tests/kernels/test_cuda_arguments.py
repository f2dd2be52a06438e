"""What the CUDA backend hands to the extension: pointers, strides and masks, read back by a stand-in on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_po.kernels import cuda, reference
from fused_po.kernels.contract import Coefficients, Span, Transform
from fused_po.stats import STATISTICS
from fused_po.testing import CASES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STREAM = 7


def at(pointer: int, dtype: torch.dtype, *shape: int, stride: int | None = None) -> Tensor | None:
    """The tensor behind a pointer, with the stride of its rows."""
    if pointer == 0:
        return None
    stride = shape[-1] if stride is None else stride
    elements = stride * (shape[0] - 1) + shape[-1] if len(shape) > 1 else shape[0]
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(pointer)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided(shape, (stride, 1)) if len(shape) > 1 else flat


class StandIn:
    """The functions of the extension, with its parameters in its order; the reference does the work."""

    def given(self, a: SimpleNamespace) -> tuple:
        assert (a.device, a.stream) == (-1, STREAM)
        x = at(a.x, DTYPES[a.dtype], a.rows, a.width, stride=a.stride)
        temperatures = at(a.temperatures, torch.float32, a.rows)
        transform = Transform(a.temperature, temperatures, a.softcap or None, a.logit_scale)
        return x, at(a.labels, torch.int64, a.rows), transform, Span(a.start, a.stop)

    def row_stats(
        self, x, dtype, rows, width, stride, labels, temperatures, temperature, softcap, logit_scale, start, stop,
        outputs, partials, device, stream,
    ) -> None:  # fmt: skip
        a = SimpleNamespace(**locals())
        found = reference.row_stats(*self.given(a), self.names(outputs))
        at(partials, torch.float32, 7, rows).copy_(found)

    def row_softmax(
        self, x, dtype, rows, width, stride, out, out_dtype, out_stride, labels, temperatures, temperature, softcap,
        logit_scale, start, stop, outputs, partials, device, stream,
    ) -> None:  # fmt: skip
        a = SimpleNamespace(**locals())
        target = at(out, DTYPES[out_dtype], rows, width, stride=out_stride)
        found = reference.row_softmax(*self.given(a), self.names(outputs), target)
        at(partials, torch.float32, 7, rows).copy_(found)

    def row_grad(
        self, x, dtype, rows, width, stride, out, out_dtype, out_stride, labels, temperatures, temperature, softcap,
        logit_scale, start, stop, anchors, c, e, l, device, stream,  # noqa: E741
    ) -> None:  # fmt: skip
        a = SimpleNamespace(**locals())
        target = at(out, DTYPES[out_dtype], rows, width, stride=out_stride)
        triple = Coefficients(*(at(pointer, torch.float32, rows) for pointer in (c, e, l)))
        reference.row_grad(*self.given(a), at(anchors, torch.float32, 4, rows), triple, target)

    def names(self, mask: int) -> tuple[str, ...]:
        assert 0 < mask < 1 << len(STATISTICS)
        return tuple(name for index, name in enumerate(STATISTICS) if mask >> index & 1)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_module", StandIn)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))


@pytest.fixture(params=["flat", "everything", "no row"])
def problem(request):
    return CASES[request.param].make(torch.bfloat16)


@pytest.mark.parametrize("outputs", [("logp",), ("logp", "is_top1"), STATISTICS])
def test_row_stats(problem, outputs):
    # not contiguous, none of them
    wide = torch.zeros(len(problem.labels), problem.x.shape[1] + 5, dtype=torch.bfloat16)
    x = wide[:, 3 : 3 + problem.x.shape[1]].copy_(problem.x)
    labels = torch.stack([problem.labels, problem.labels + 1], 1)[:, 0]
    arguments = (problem.transform, Span(0, problem.vocab_size), outputs)
    want = reference.row_stats(problem.x, problem.labels, *arguments)
    assert torch.equal(cuda.row_stats(x, labels, *arguments), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_softmax(problem, dtype):
    arguments = (problem.labels, problem.transform, Span(0, problem.vocab_size), ("logp", "entropy"))
    want, got = (torch.full(problem.x.shape, torch.nan, dtype=dtype) for _ in range(2))
    partials = reference.row_softmax(problem.x, *arguments, want)
    assert torch.equal(cuda.row_softmax(problem.x, *arguments, got), partials)
    assert torch.equal(got, want)


@pytest.mark.parametrize("which", ["c", "ce", "el", "cel"])
def test_row_grad(problem, which):
    count = len(problem.labels)
    values = torch.randn(count, 7)
    # columns: strided
    triple = Coefficients(*(values[:, i] if name in which else None for i, name in enumerate("cel")))
    anchors = -values[:, 3:].abs().t()
    span = Span(0, problem.vocab_size)
    want = torch.empty(problem.x.shape)
    reference.row_grad(problem.x, problem.labels, problem.transform, span, anchors, triple, want)
    got = torch.full((count, problem.x.shape[1] + 4), torch.nan)[:, 1:-3]
    cuda.row_grad(problem.x, problem.labels, problem.transform, span, anchors, triple, got)
    assert torch.equal(got, want)


def test_the_stand_in_has_the_parameters_of_the_extension(cuda_module):
    for name in ("row_stats", "row_softmax", "row_grad"):
        signature = getattr(cuda_module, name).__doc__.splitlines()[0]
        parameters = [part.split(":")[0].strip() for part in signature.split("(", 1)[1].split(",")]
        assert parameters == list(inspect.signature(getattr(StandIn(), name)).parameters)
