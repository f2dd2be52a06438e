"""The CUDA kernels on fibers: each path against the reference, and bugs planted in the sources, which must be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_po.kernels import reference
from fused_po.kernels.contract import Coefficients, Span, Transform, finish
from fused_po.stats import STATISTICS
from fused_po.testing import CASES, KernelProblem, assert_accurate
from tests.kernels.fiber import GPUS, Fibers, Plant, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="fibers need a C++ compiler")

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN = Transform()


def softmax(backend: Fibers, problem: KernelProblem, out: Tensor) -> Tensor:
    span = Span(0, problem.vocab_size)
    return backend.row_softmax(problem.x, problem.labels, problem.transform, span, STATISTICS, out)


def in_place(backend: Fibers, problem: KernelProblem) -> list[Tensor]:
    """Partials and G, from a copy of the rows."""
    x = problem.x.clone()
    partials = backend.row_softmax(x, problem.labels, problem.transform, Span(0, problem.vocab_size), STATISTICS, x)
    return [partials, x]


def problem_of(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> KernelProblem:
    generator = torch.Generator().manual_seed(rows + width)
    x = 3 * torch.randn(rows, width, generator=generator)
    labels = torch.randint(0, width, (rows,), generator=generator)
    return KernelProblem(x.to(dtype), labels, PLAIN, width)


@pytest.mark.pairwise
@pytest.mark.parametrize("out_element", FLOATS)
@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", CASES)
def test_every_path_from_each_type_to_each(case, gpu, element, out_element):
    """G and dL/dx against float64, with the reference in float32 as the naive result, and in place the same bits."""
    backend, problem = Fibers(gpu), CASES[case].make(FLOATS[element])
    wide, exact = (
        KernelProblem(problem.x.to(dtype), problem.labels, transform_to(problem.transform, dtype), problem.vocab_size)
        for dtype in (torch.float32, torch.float64)
    )
    span, out_dtype = Span(0, problem.vocab_size), FLOATS[out_element]
    out = torch.full_like(problem.x, torch.nan, dtype=out_dtype)
    partials = softmax(backend, problem, out)
    naive, truth = (torch.empty_like(p.x) for p in (wide, exact))
    anchors = []
    for p, g in ((wide, naive), (exact, truth)):
        found = reference.row_softmax(p.x, p.labels, p.transform, span, STATISTICS, g)
        anchors.append(finish(found, p.labels, p.vocab_size, STATISTICS)[1])
    assert_accurate(out, naive.to(out_dtype), truth, "G")
    triple = Coefficients(*torch.randn(3, problem.x.shape[0], generator=torch.Generator().manual_seed(1)))
    got = torch.full_like(out, torch.nan)
    _, own = finish(partials, problem.labels, problem.vocab_size, STATISTICS)
    backend.row_grad(problem.x, problem.labels, problem.transform, span, own, triple, got)
    reference.row_grad(wide.x, wide.labels, wide.transform, span, anchors[0], triple, naive)
    precise = Coefficients(*(c.double() for c in triple if c is not None))
    reference.row_grad(exact.x, exact.labels, exact.transform, span, anchors[1], precise, truth)
    assert_accurate(got, naive.to(out_dtype), truth, "dL/dx")
    if element == out_element:
        again = in_place(backend, problem)
        assert torch.equal(again[0], partials)
        assert torch.equal(again[1], out)


def transform_to(transform: Transform, dtype: torch.dtype) -> Transform:
    temperatures = None if transform.temperatures is None else transform.temperatures.to(dtype)
    return Transform(transform.temperature, temperatures, transform.softcap, transform.logit_scale)


def test_small_rows_take_every_path():
    """The made-up GPUs do what they were made up for: clusters of each size, and rows too long for any."""
    sizes = set()
    for width in (60, 200, 300, 800, 5000, 20000):
        backend, problem = Fibers("cluster"), problem_of(2, width)
        softmax(backend, problem, torch.empty_like(problem.x))
        launch = backend.last_launch
        sizes.add((launch["cluster"], launch["blocks"]))
    assert sizes == {(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)}, sizes
    wide = problem_of(1, 20000)
    softmax(Fibers("resident"), wide, torch.empty_like(wide.x))
    # the row and its scratch, in one block
    assert Fibers("resident").last_launch["shared"] > 40000


@pytest.mark.parametrize("gpu", GPUS)
def test_the_order_of_threads_changes_no_bit(gpu):
    problem = CASES["everything"].make(torch.bfloat16)
    want = in_place(Fibers(gpu, 1), problem)
    for seed in range(2, 12):
        assert all(torch.equal(a, b) for a, b in zip(in_place(Fibers(gpu, seed), problem), want, strict=True))


@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("gpu", GPUS)
def test_alignment_changes_no_bit(gpu, element):
    """Rows that begin and end at any element, read from and written to other alignments."""
    dtype = FLOATS[element]
    for width in (1, 7, 8, 9, 300, 333, 1025):
        problem = problem_of(3, width, dtype)
        want = torch.empty_like(problem.x)
        partials = softmax(Fibers(gpu), problem, want)
        for offset in range(0, 8, 1 if width < 300 else 3):
            for stride in (width + 8, width + 9):
                x, out = (torch.full((3, stride), torch.nan, dtype=dtype) for _ in range(2))
                x[:, offset : offset + width] = problem.x
                begin = 7 - offset
                moved = KernelProblem(x[:, offset : offset + width], problem.labels, PLAIN, width)
                got = out[:, begin : begin + width]
                assert torch.equal(softmax(Fibers(gpu), moved, got), partials)
                assert torch.equal(got, want)
                assert out.isnan().sum() == out.numel() - want.numel()
                softmax(Fibers(gpu), moved, moved.x)
                assert torch.equal(moved.x, want)


def top1(partials, labels):
    return finish(partials, labels, 1000, ("is_top1",))[0].is_top1


@pytest.mark.parametrize("gpu", GPUS)
def test_padding_and_shards(gpu):
    """Columns beyond the span get 0; a target of another shard is nowhere here."""
    problem = problem_of(5, 301, torch.float32)
    labels = torch.tensor([3, 120, 250, -100, 700])
    x, span = problem.x, Span(100, 340)
    x[:, 240:] = torch.nan
    out, want = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    backend, keep, here = Fibers(gpu), [0, 1, 2, 4], [1, 2, 3]
    partials = backend.row_softmax(x, labels, PLAIN, span, STATISTICS, out)
    expected = reference.row_softmax(x, labels, PLAIN, span, STATISTICS, want)
    # the last one only decides ties
    torch.testing.assert_close(partials[:6, keep], expected[:6, keep])
    assert torch.equal(top1(partials, labels)[keep], top1(expected, labels)[keep])
    torch.testing.assert_close(out[here], want[here])
    torch.testing.assert_close(out[[0, 4], :240], -torch.softmax(x[[0, 4], :240], 1))
    partials = backend.row_stats(x, labels, PLAIN, span, STATISTICS)
    torch.testing.assert_close(partials[:6, keep], expected[:6, keep])
    _, anchors = finish(expected, labels, 1000, STATISTICS)
    triple = Coefficients(*torch.ones(3, 5))
    backend.row_grad(x, labels, PLAIN, span, anchors, triple, out)
    reference.row_grad(x, labels, PLAIN, span, anchors, triple, want)
    torch.testing.assert_close(out, want)
    assert (out[:, 240:] == 0).all()
    assert (out[3] == 0).all()


BARRIERS = (
    Plant(
        "sweep.cuh",
        "(scratch->warps[warp], sweep);\n  device::block_barrier",
        "(scratch->warps[warp], sweep);\n  if (!ON) device::block_barrier",
    ),
    Plant(
        "sweep.cuh",
        "  device::cluster_arrive();\n  device::cluster_wait();",
        "  if (ON) device::cluster_arrive_relaxed();\n  else device::cluster_arrive();\n  device::cluster_wait();",
    ),
    # in what the one before has made
    Plant(
        "sweep.cuh",
        "  else device::cluster_arrive();\n  device::cluster_wait();",
        "  else if (!ON) device::cluster_arrive();\n  if (!ON) device::cluster_wait();",
    ),
    Plant("sweep.cuh", "_relaxed();\n  device::block_barrier();", "_relaxed();\n  if (!ON) device::block_barrier();"),
    Plant("resident.cuh", "place);\n  device::block_barrier();", "place);\n  if (!ON) device::block_barrier();"),
    Plant(
        "resident.cuh",
        "    device::landing_wait(landing++);",
        "    if (!ON) device::landing_wait(landing);\n    landing++;",
    ),
    Plant("resident.cuh", "  if (size > 1) device::cluster_wait();", "  if (size > 1 && !ON) device::cluster_wait();"),
    Plant("resident.cuh", "      device::landing_publish();", "      if (!ON) device::landing_publish();"),
)
BOUNDS = (
    Plant("elements.cuh", ">= 0 && column + i < width) {", ">= 0 && column + i < width + ON) {"),
    Plant(
        "resident.cuh", "if (tail != end && tail + 16 <= row_end)", "if (tail != end && (ON || tail + 16 <= row_end))"
    ),
    Plant(
        "elements.cuh",
        "column + i < end) device::store_global(address + 2 * i",
        "column + i < end + ON) device::store_global(address + 2 * i",
    ),
)
MISALIGNED = Plant("resident.cuh", "memory + (offset - odd);", "memory + (offset - (ON ? 0 : odd));")
PLANTS = (*BARRIERS, *BOUNDS, MISALIGNED)


def number(plant: Plant) -> int:
    return PLANTS.index(plant) + 1


def test_a_build_with_all_bugs_off_is_sound():
    problem = problem_of(4, 500)
    for gpu in GPUS:
        want = in_place(Fibers(gpu), problem)
        assert all(torch.equal(a, b) for a, b in zip(in_place(Fibers(gpu, 1, PLANTS), problem), want, strict=True))


@pytest.mark.parametrize("plant", BARRIERS, ids=[str(number(plant)) for plant in BARRIERS])
def test_a_missing_barrier_is_seen(plant):
    """By a result that is wrong or moves with the order of threads, or by the executor itself."""
    # several rows, and rows that do not begin on 16 bytes
    problem = problem_of(4, 501)
    want = in_place(Fibers("cluster"), problem)
    seen = 0
    for seed in range(1, 9):
        try:
            got = in_place(Fibers("cluster", seed, PLANTS, number(plant)), problem)
            seen += not all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        except RuntimeError:
            seen += 1
    assert seen


@pytest.mark.parametrize("plant, gpu", [(0, "streamed"), (1, "resident"), (2, "streamed"), (2, "cluster")])
def test_an_access_out_of_bounds_is_seen(plant, gpu):
    problem = problem_of(2, 301)
    out = torch.empty_like(problem.x)
    with pytest.raises(RuntimeError, match="row_softmax .*: a (read|write) out of bounds in global memory"):
        softmax(Fibers(gpu, 1, PLANTS, number(BOUNDS[plant])), problem, out)


def test_a_misaligned_access_is_seen():
    problem = problem_of(2, 301)
    with pytest.raises(RuntimeError, match="a misaligned access to shared memory"):
        softmax(Fibers("resident", 1, PLANTS, number(MISALIGNED)), problem, torch.empty_like(problem.x))


@pytest.mark.parametrize(
    ("gpu", "width", "cluster"),
    [("older-code", 300, 1), ("cluster", 600, 8), ("crowded", 600, 2), ("crowded", 2400, 1)],
)
def test_where_a_cluster_can_not_run_rows_go_elsewhere(gpu, width, cluster):
    """A GPU whose build has only older code, and one without room for the cluster that a row wants: into a smaller
    cluster, or streamed. Stand-ins say what fits: no GPU has been asked.
    """
    problem = problem_of(3, width)
    want, got = torch.empty_like(problem.x), torch.empty_like(problem.x)
    partials = softmax(Fibers("streamed"), problem, want)
    streamed = Fibers("streamed").last_launch
    backend = Fibers(gpu)
    torch.testing.assert_close(softmax(backend, problem, got), partials)
    torch.testing.assert_close(got, want)
    launch = backend.last_launch
    assert launch["cluster"] == cluster
    # a streamed row leaves no more than partial statistics in shared memory
    assert (launch["shared"] == streamed["shared"]) == (cluster == 1)


def test_what_fits_is_asked_once():
    backend, problem = Fibers("cluster"), problem_of(2, 777)
    counts = []
    for _ in range(3):
        softmax(backend, problem, torch.empty_like(problem.x))
        counts.append(backend.last_launch["questions"])
    assert counts[0] == counts[1] == counts[2] > 0


def test_a_case_that_makes_no_sense_is_refused_in_words():
    problem = problem_of(2, 300)
    backend = Fibers("resident")
    with pytest.raises(RuntimeError, match="row_stats .*300.*: there are fewer columns than classes"):
        backend.row_stats(problem.x[:, :200], problem.labels, PLAIN, Span(0, 300), ("logp",))
    with pytest.raises(RuntimeError, match="in place, the output has the type and stride of the logits"):
        softmax(backend, problem, problem.x.view(torch.float16))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("logit_scale", [-1.5, 0.0])
@pytest.mark.parametrize("gpu", GPUS)
def test_a_scale_that_is_not_positive(gpu, logit_scale, softcap):
    """What a sweep follows is then the smallest raw logit, or none; the target stays masked."""
    given = problem_of(3, 3001, torch.float32)
    transform = Transform(softcap=softcap, logit_scale=logit_scale)
    problem, span = KernelProblem(given.x, given.labels, transform, 2999), Span(0, 2999)
    out = torch.empty_like(problem.x)
    got, _ = finish(softmax(Fibers(gpu), problem, out), problem.labels, 2999, STATISTICS)
    results = []
    for dtype in (torch.float32, torch.float64):
        x, gradient = problem.x.to(dtype), torch.empty_like(problem.x, dtype=dtype)
        partials = reference.row_softmax(x, problem.labels, transform, span, STATISTICS, gradient)
        results.append((finish(partials, problem.labels, 2999, STATISTICS)[0], gradient))
    (naive, naive_gradient), (truth, true_gradient) = results
    assert_accurate(out, naive_gradient, true_gradient, "G")
    for name in ("logp", "entropy", "lse", "mean_logit", "log_sum_sq_probs"):
        assert_accurate(getattr(got, name), getattr(naive, name), getattr(truth, name), name)
    assert torch.equal(got.is_top1, truth.is_top1)
