"""The machine code of every kernel, executed: each instance of the CUDA kernels once, Triton's flags in pairs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fused_po.kernels import triton_blocks
from fused_po.stats import STATISTICS
from fused_po.testing import assert_accurate
from tests.kernels.ptx import unavailable_backend
from tests.kernels.ptx.launch_cuda import CudaPtx, modules, noted_kernels
from tests.kernels.ptx.launch_triton import TritonPtx, run_products
from tests.kernels.ptx.problems import FLOATS, problem, run_grad, run_softmax, run_stats
from tests.pairwise import pairwise

needs_nvcc = pytest.mark.skipif(unavailable_backend("cuda-ptx") is not None, reason="needs nvcc and a C++ compiler")
WANTED = {"logp": ("logp",), "entropy": ("logp", "entropy"), "everything": STATISTICS}
# kernel, path, element, softcap, what is wanted
INSTANCES = [
    *(("row_stats", "streamed", *rest) for rest in product(FLOATS, (False, True), WANTED)),
    *(("row_softmax", *rest) for rest in product(("streamed", "cluster"), FLOATS, (False, True), WANTED)),
    *(("row_grad", "streamed", *rest) for rest in product(FLOATS, (False, True), ("c", "cel"))),
]


def run_instance(backend: CudaPtx, kernel: str, element: str, softcap: bool, wanted: str, seed: int) -> None:
    p, rows = problem(seed, element, softcap)
    out = list(FLOATS)[seed % 3]
    if kernel == "row_stats":
        run_stats(backend, p, rows, WANTED[wanted])
    elif kernel == "row_softmax":
        run_softmax(backend, p, rows, WANTED[wanted], out, seed)
    else:
        run_grad(backend, p, rows, wanted, out, seed)


@needs_nvcc
@pytest.mark.parametrize("number", range(len(INSTANCES)), ids=lambda n: "-".join(map(str, INSTANCES[n])))
def test_instances_of_the_cuda_kernels(number):
    kernel, gpu, element, softcap, wanted = INSTANCES[number]
    run_instance(CudaPtx(gpu, seed=number), kernel, element, softcap, wanted, number)


@needs_nvcc
def test_these_are_all_instances():
    """By the names of the kernels that the host code launches, and of those in the PTX."""
    launched = set()
    for kernel, gpu, element, softcap, wanted in INSTANCES:
        p, _ = problem(0, element, softcap)
        launched |= noted_kernels(gpu, kernel, p, WANTED.get(wanted, ()), "e" in wanted)
    assert launched == {name for module in modules().values() for name in module.names}


@needs_nvcc
@pytest.mark.parametrize("number", range(12))
def test_resident_rows_in_clusters_of_each_size(number):
    """Rows of 1 to 16 blocks, with copies that land late and early, from any alignment."""
    width = (60, 200, 330, 801, 1999, 4500)[number % 6]
    element = list(FLOATS)[number % 3]
    p, rows = problem(100 + number, element, number % 2 == 1, width=width)
    run_softmax(CudaPtx("cluster", seed=100 + number), p, rows, STATISTICS, element, number)


STATS_FLAGS = pairwise(
    element=list(FLOATS),
    softcap=[False, True],
    temperatures=[False, True],
    aligned=[False, True],
    width=[300, 5000],
    **{name: [False, True] for name in ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")},
)
SOFTMAX_FLAGS = pairwise(
    element=list(FLOATS),
    out=list(FLOATS),
    softcap=[False, True],
    temperatures=[False, True],
    aligned=[False, True],
    wanted=[("logp",), STATISTICS],
)
GRAD_FLAGS = pairwise(
    element=list(FLOATS),
    out=list(FLOATS),
    softcap=[False, True],
    temperatures=[False, True],
    aligned=[False, True],
    which=["c", "e", "l", "cel"],
)


def flags_of(case: dict) -> str:
    return "-".join(str(value if not isinstance(value, tuple) else len(value)) for value in case.values())


def triton_stats(number: int, architecture: int) -> None:
    case = dict(STATS_FLAGS[number])
    given = {name: case.pop(name) for name in ("temperatures", "width", "aligned")}
    p, rows = problem(200 + number, case.pop("element"), case.pop("softcap"), **given)
    wanted = ("logp", *(name for name, on in case.items() if on))
    run_stats(TritonPtx(architecture, number), p, rows, tuple(name for name in STATISTICS if name in wanted))


def triton_softmax(number: int, architecture: int) -> None:
    case = SOFTMAX_FLAGS[number]
    given = {name: case[name] for name in ("temperatures", "aligned")}
    p, rows = problem(1100 + number, case["element"], case["softcap"], width=(300, 2500)[number % 2], **given)
    run_softmax(TritonPtx(architecture, number), p, rows, case["wanted"], case["out"], number)


def triton_grad(number: int, architecture: int) -> None:
    case = GRAD_FLAGS[number]
    given = {name: case[name] for name in ("temperatures", "aligned")}
    p, rows = problem(700 + number, case["element"], case["softcap"], width=(300, 4500)[number % 2], **given)
    run_grad(TritonPtx(architecture, number), p, rows, case["which"], case["out"], number)


TRITON = [
    pytest.param(run, number, id=f"{run.__name__}-{flags_of(flags[number])}")
    for run, flags in ((triton_stats, STATS_FLAGS), (triton_softmax, SOFTMAX_FLAGS), (triton_grad, GRAD_FLAGS))
    for number in range(len(flags))
]


@pytest.mark.parametrize(("run", "number"), TRITON)
def test_flags_of_the_triton_kernels(run, number):
    run(number, 90)


PRODUCTS = pairwise(
    element=list(FLOATS),
    stored=["as the tile", "fp32"],
    shape=[(70, 300, 40), (64, 256, 136), (1, 1, 1)],
    turned=[False, True],
)


@pytest.mark.parametrize("number", range(len(PRODUCTS)), ids=lambda n: flags_of(PRODUCTS[n]))
def test_triton_products_of_kept_blocks(number):
    case = PRODUCTS[number]
    (count, vocab, hidden), dtype = case["shape"], FLOATS[case["element"]]
    generator = torch.Generator().manual_seed(number)
    tile = torch.randn(count, vocab + 8, generator=generator).to(dtype)[:, :vocab]
    stored = torch.float32 if case["stored"] == "fp32" else dtype
    other = torch.randn(count if case["turned"] else vocab, hidden, generator=generator).to(stored)
    kept = torch.rand(-(-count // triton_blocks.GROUP), -(-vocab // triton_blocks.WIDTH), generator=generator) < 0.7
    mask = kept.repeat_interleave(triton_blocks.GROUP, 0)[:count].repeat_interleave(triton_blocks.WIDTH, 1)[:, :vocab]
    left, right = torch.where(mask, tile, 0.0), other.to(dtype)
    # every fourth order is the slowest here
    seed = (1, 3, 4)[number % 3]
    if case["turned"]:
        before = torch.randn(vocab, hidden, generator=generator)
        out = before.clone()
        run_products(lambda: triton_blocks.block_mm_t(tile, other, kept, out), out, seed)
        naive, truth = (before.to(d) + left.to(d).t() @ right.to(d) for d in (torch.float32, torch.float64))
    else:
        out = torch.full((count, hidden), torch.nan)
        run_products(lambda: triton_blocks.block_mm(tile, other, kept, out), out, seed)
        naive, truth = (left.to(d) @ right.to(d) for d in (torch.float32, torch.float64))
    assert_accurate(out, naive, truth, "dW" if case["turned"] else "dH")
