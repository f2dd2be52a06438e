"""The machine must see what is missing: each synchronising instruction of a kernel removed or weakened, one at a time.

Seen means a fault, a deadlock or another result under one of a dozen orders of threads and copies. What is removed:
block barriers, arrivals and waits at the cluster barrier and at mbarriers, initialisations, expected bytes, copies,
``fence.proxy.async``. What is weakened: a release at the cluster barrier to relaxed.

What the machine can't see: a fence or a release that orders accesses to global memory, which it makes visible at once;
an acquire that is missing at a wait, since values are fetched when they are read; a barrier that keeps no two warps
from one place, which is none; a fence of the async proxy that keeps
reads by threads before writes by the copy engine (the other way round it sees).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_po.kernels import triton_blocks
from fused_po.kernels.contract import Span, Transform
from fused_po.stats import STATISTICS
from fused_po.testing import KernelProblem
from tests.kernels.ptx import unavailable_backend
from tests.kernels.ptx.launch_cuda import CudaPtx, modules
from tests.kernels.ptx.launch_triton import TritonPtx, compiled, run_products
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.mutate import Mutation, mutations
from tests.kernels.ptx.parse import Kernel
from tests.kernels.ptx.scheduler import ORDERS

needs_nvcc = pytest.mark.skipif(unavailable_backend("cuda-ptx") is not None, reason="needs nvcc and a C++ compiler")
Run = Callable[[KernelProblem, Any], list[Tensor]]


def rows_of(rows: int, width: int) -> KernelProblem:
    generator = torch.Generator().manual_seed(rows + width)
    x = (3 * torch.randn(rows, width, generator=generator)).bfloat16()
    return KernelProblem(x, torch.randint(0, width, (rows,), generator=generator), Transform(), width)


def stats(p: KernelProblem, backend: Any) -> list[Tensor]:
    return [backend.row_stats(p.x, p.labels, p.transform, Span(0, p.vocab_size), STATISTICS)]


def softmax(p: KernelProblem, backend: Any) -> list[Tensor]:
    """In place, in a copy."""
    x = p.x.clone()
    return [backend.row_softmax(x, p.labels, p.transform, Span(0, p.vocab_size), STATISTICS, x), x]


def unseen(kernel: Kernel, run: Run, made: list[tuple[Callable[..., Any], KernelProblem]]) -> list[Mutation]:
    """Which mutations no order of threads shows on any of the problems; (backend, problem) in ``made``."""
    wants = [run(p, backend(salt=1)) for backend, p in made]
    found = []
    for mutation in mutations(kernel):
        for seed in range(1, ORDERS + 1):
            if any(
                shows(run, p, backend(seed=seed, salt=1, change=mutation), want)
                for (backend, p), want in zip(made, wants, strict=True)
            ):
                break
        else:
            found.append(mutation)
    return found


def shows(run: Run, p: KernelProblem, backend: Any, want: list[Tensor]) -> bool:
    try:
        return not all(torch.equal(a, b) for a, b in zip(run(p, backend), want, strict=True))
    except Fault:
        return True


def cuda(gpu: str) -> Callable[..., Any]:
    return lambda **options: CudaPtx(gpu, **options)


def instance(file: str, words: str) -> Kernel:
    module = modules()[file]
    (name,) = (name for name in module.names if words in name)
    return module.kernel(name)


@needs_nvcc
def test_of_the_resident_kernel():
    """A row in a block, with as many copies as there may be; and rows over clusters in which each warp has work."""
    kernel = instance("row_softmax", "resident_kernelINS_8BFloat16ELb0ELi15E")
    assert len(mutations(kernel)) >= 15
    assert unseen(kernel, softmax, [(cuda("resident"), rows_of(1, 4096)), (cuda("cluster"), rows_of(1, 2501))]) == []


@needs_nvcc
def test_of_the_streamed_kernels():
    for file, words, run in (
        ("row_stats", "row_stats_kernelINS_8BFloat16ELb0ELi15E", stats),
        ("row_softmax", "row_softmax_kernelINS_8BFloat16ELb0ELi15E", softmax),
    ):
        kernel = instance(file, words)
        assert mutations(kernel)
        assert unseen(kernel, run, [(cuda("streamed"), rows_of(2, 2501))]) == []


def test_of_the_triton_kernels():
    for run in (stats, softmax):
        p = rows_of(2, 5000)
        plain = TritonPtx(salt=1)
        run(p, plain)
        kernel = compiled(plain.launches[0][0], 90).program.kernel
        assert mutations(kernel)
        assert unseen(kernel, run, [(lambda **options: TritonPtx(90, **options), p)]) == []


@pytest.mark.parametrize("turned", [False, True])
def test_of_the_products_of_kept_blocks(turned):
    """Copies by threads that are waited for, and products on the tensor cores that read what they brought."""
    generator = torch.Generator().manual_seed(0)
    count, vocab = (256, 128) if turned else (64, 512)
    tile = torch.randn(count, vocab, generator=generator).bfloat16()
    other = torch.randn(count if turned else vocab, 16, generator=generator).bfloat16()
    kept = torch.ones(count // 64, vocab // 128, dtype=torch.bool)
    product = triton_blocks.block_mm_t if turned else triton_blocks.block_mm
    found: list[Kernel] = []

    def run(seed: int, change: Callable[[Kernel], None] | None) -> Tensor:
        out = torch.zeros(vocab if turned else count, 16)
        run_products(lambda: product(tile, other, kept, out), out, seed, change)
        return out

    def shown(mutation: Mutation) -> bool:
        for seed in range(1, ORDERS + 1):
            try:
                if not torch.equal(run(seed, mutation), want):
                    return True
            except Fault:
                return True
        return False

    want = run(4, found.append)
    left = [mutation.what for mutation in mutations(found[0]) if not shown(mutation)]
    # before it each thread reads, and after it writes, places that are its own: Triton's barrier keeps nobody apart
    assert set(left) <= {"remove bar.sync"} and len(left) <= turned
