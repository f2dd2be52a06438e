"""The CUDA backend on a GPU: chosen without asking, on the current stream, compiled and captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_po import token_stats
from fused_po.kernels import cuda, library
from fused_po.kernels.contract import Span, Transform
from fused_po.kernels.select import select
from fused_po.testing import self_test

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def extension() -> None:
    torch.manual_seed(0)
    module, reason = cuda.extension()
    assert module is not None, reason


def logits(rows: int = 64, vocab: int = 32003) -> tuple[Tensor, Tensor]:
    x = 3 * torch.randn(rows, vocab, device="cuda")
    return x.bfloat16(), torch.randint(vocab, (rows,), device="cuda")


def stats(x: Tensor, labels: Tensor, backend: str | None = "cuda") -> Tensor:
    return library.row_stats(x, labels, Transform(), Span(0, x.shape[1]), ("logp", "entropy"), backend)


def test_it_comes_first():
    x, _ = logits()
    assert select("row_stats", x, None).__name__ == "fused_po.kernels.cuda"
    assert select("row_stats", x.double(), None).__name__ == "fused_po.kernels.reference"


def test_self_test():
    assert [check for check in self_test("cuda", "cuda") if not check.passed] == []


def test_it_runs_on_the_current_stream():
    x, labels = logits()
    want = stats(x, labels)
    late = torch.empty_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # on another stream the kernel would read before this is written
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = stats(late, labels)
    stream.synchronize()
    assert torch.equal(got, want)


def test_it_is_captured_in_a_graph():
    x, labels = logits()
    want = stats(x, labels).clone()
    empty = torch.zeros_like(x)
    stats(empty, labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = stats(empty, labels)
    empty.copy_(x)
    graph.replay()
    assert torch.equal(got, want)


def test_it_is_compiled_around():
    x, labels = logits()

    def total(x: Tensor) -> Tensor:
        found = token_stats(x, labels, outputs=("logp", "entropy"), backend="cuda")
        return (found.logp + 0.1 * found.entropy).sum()

    eager, compiled = (x.detach().clone().requires_grad_() for _ in range(2))
    total(eager).backward()
    torch.compile(total, fullgraph=True)(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)
    torch._dynamo.reset()


def test_it_agrees_with_triton():
    x, labels = logits()
    torch.testing.assert_close(stats(x, labels), stats(x, labels, "triton"), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_device_of_the_tensor():
    x, labels = logits()
    want = stats(x, labels)
    got = stats(x.to("cuda:1"), labels.to("cuda:1"))
    assert got.device.index == 1 and torch.equal(got.cpu(), want.cpu())
