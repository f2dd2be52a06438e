"""More of the machine code than every run of the tests has time for: other architectures, real vocabularies, more than
2^31 logits.
"""

from __future__ import annotations

import pytest
import torch

from fused_po.kernels.contract import Coefficients, Span, Transform, finish
from fused_po.stats import STATISTICS
from fused_po.testing import KernelProblem
from tests.kernels.ptx import unavailable_backend
from tests.kernels.ptx.launch_cuda import CudaPtx
from tests.kernels.ptx.launch_triton import TritonPtx
from tests.kernels.ptx.problems import FLOATS, run_grad, run_softmax, run_stats
from tests.kernels.test_ptx_kernels import INSTANCES, TRITON, run_instance

pytestmark = pytest.mark.large
needs_nvcc = pytest.mark.skipif(unavailable_backend("cuda-ptx") is not None, reason="needs nvcc and a C++ compiler")
BACKENDS = [pytest.param(CudaPtx, id="cuda", marks=needs_nvcc), pytest.param(TritonPtx, id="triton")]


@pytest.mark.parametrize("architecture", [80, 100, 120])
@pytest.mark.parametrize(("run", "number"), TRITON)
def test_triton_on_other_architectures(run, number, architecture):
    run(number, architecture)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "100", "120"])
@pytest.mark.parametrize("number", range(len(INSTANCES)), ids=lambda n: "-".join(map(str, INSTANCES[n])))
def test_cuda_on_other_architectures(number, architecture):
    kernel, gpu, element, softcap, wanted = INSTANCES[number]
    if architecture == "80" and gpu == "cluster":
        pytest.skip("there are no clusters before sm_90")
    run_instance(CudaPtx(gpu, architecture, seed=number), kernel, element, softcap, wanted, number)


def vocabulary(width: int, element: str) -> tuple[KernelProblem, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = (3 * torch.randn(5, width, generator=generator) - 2).to(FLOATS[element])
    labels = torch.randint(0, width, (5,), generator=generator)
    x[0, labels[0]] = 20.0
    return KernelProblem(x, labels, Transform(), width), torch.arange(5)


def made(backend: type, **options: object) -> object:
    return backend("resident", **options) if backend is CudaPtx else backend(90, **options)


@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [32000, 128256, 151936, 248320])
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_vocabularies(backend, width, element):
    """With the geometry that a launch on an H100 has."""
    run_softmax(made(backend), *vocabulary(width, element), ("logp", "entropy", "lse"), "bf16", 1)
    run_grad(made(backend), *vocabulary(width, element), "cel", "bf16", 1)


@pytest.mark.parametrize("element", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [32000, 128256, 151936, 248320])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_real_vocabularies(backend, width, element):
    run_stats(made(backend), *vocabulary(width, element))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_logits(backend):
    """Row offsets are 64 bits: the last rows of a matrix of which nothing else is in memory."""
    vocab, rows, last = 131072, 16400, 2
    # memory that is never touched takes none
    x = torch.empty(rows, vocab, dtype=torch.bfloat16)
    x[-last:] = torch.randn(last, vocab, generator=torch.Generator().manual_seed(0))
    labels = torch.full((rows,), 5)
    tail, span = x[-last:].clone(), Span(0, vocab)
    transform = Transform()
    want = made(backend, salt=1).row_stats(tail, labels[-last:], transform, span, STATISTICS)
    assert torch.equal(
        made(backend, salt=1, last=last).row_stats(x, labels, transform, span, STATISTICS)[:, -last:], want
    )
    _, anchors = finish(want, labels[-last:], vocab, STATISTICS)
    triple = Coefficients(torch.ones(rows), torch.ones(rows), None)
    tile, gradient = torch.empty_like(tail), torch.empty_like(tail)
    made(backend, salt=1).row_softmax(tail, labels[-last:], transform, span, STATISTICS, tile)
    few = Coefficients(triple.logp[-last:], triple.entropy[-last:], None)
    made(backend, salt=1).row_grad(tail, labels[-last:], transform, span, anchors, few, gradient)
    made(backend, salt=1, last=last).row_softmax(x, labels, transform, span, STATISTICS, x)
    assert torch.equal(x[-last:], tile)
    x[-last:] = tail
    whole = torch.zeros(4, rows)
    whole[:, -last:] = anchors
    made(backend, salt=1, last=last).row_grad(x, labels, transform, span, whole, triple, x)
    assert torch.equal(x[-last:], gradient)
