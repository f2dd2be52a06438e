"""One suite for every backend: against float64, at the edges of floating point, and on awkward memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_po.kernels import library
from fused_po.kernels.contract import Coefficients, Span, finish
from fused_po.ops.plain import plain_stats
from fused_po.stats import STATISTICS, Stats
from fused_po.testing import CASES, KernelProblem, assert_accurate
from tests.interpreted import skip_unless_interpreted
from tests.kernels import fiber, ptx

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BACKENDS = {
    "reference": ("reference", "cpu"),
    "triton-interpreted": ("triton", "cpu"),
    "triton-gpu": ("triton", "cuda"),
    "cuda-gpu": ("cuda", "cuda"),
    # the CUDA kernels on the CPU, on made-up GPUs
    **{name: (name, "cpu") for name in fiber.register()},
    # what the compilers make of the kernels, executed; test_ptx_kernels runs a part of it each time
    **{name: (name, "cpu") for name in ptx.register()},
}


def on_backends(*elements: str) -> pytest.MarkDecorator:
    """Every backend, with each of the element types it supports, if any are named."""
    found = []
    for name, (backend, device) in BACKENDS.items():
        marks = pytest.mark.gpu if device == "cuda" else pytest.mark.large if "ptx" in backend else ()
        if not elements:
            found.append(pytest.param(backend, device, id=name, marks=marks))
        # float64 is left to the reference, which test_library checks
        supported = (e for e in elements if backend == "reference" or e != "fp64")
        found += (pytest.param(backend, device, e, id=f"{name}-{e}", marks=marks) for e in supported)
    return pytest.mark.parametrize("backend, device, element" if elements else "backend, device", found)


backends = on_backends()


def interpreted_or_skip(backend: str, device: str) -> None:
    if backend == "triton" and device == "cpu":
        skip_unless_interpreted()
    if backend.startswith("fibers") and fiber.compiler() is None:
        pytest.skip("the CUDA kernels need a C++ compiler to run on the CPU")
    if "ptx" in backend and (reason := ptx.unavailable_backend(backend)):
        pytest.skip(reason)


def plain(problem: KernelProblem, dtype: torch.dtype) -> tuple[Tensor, Stats]:
    """A leaf (N, vocab) and its statistics by the textbook; in float64, by formulas exact in the tails."""
    leaf = problem.x[:, : problem.vocab_size].to(dtype).requires_grad_()
    transform, labels = problem.transform, problem.labels
    temperature = transform.temperature if transform.temperatures is None else transform.temperatures.to(dtype)
    options = {"softcap": transform.softcap, "logit_scale": transform.logit_scale}
    stats = plain_stats(leaf, labels, temperature=temperature, **options)
    if dtype != torch.float64:
        return leaf, stats
    z = leaf * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
    column = labels.unsqueeze(1)
    target = z.gather(1, column)
    rest = torch.logsumexp(z.scatter(1, column, -1e9), 1, keepdim=True)
    logp = -torch.logaddexp(rest - target, torch.zeros_like(rest))
    log_p = ((z - target) + logp).scatter(1, column, logp)
    entropy = -torch.where(log_p > -700, log_p.exp() * log_p, 0.0).sum(1)
    squares = torch.logsumexp(2 * log_p, 1)
    lse = (target - logp).squeeze(1)
    exact = {"logp": logp.squeeze(1), "entropy": entropy, "lse": lse, "log_sum_sq_probs": squares}
    return leaf, replace(stats, **exact, max_logp=log_p.amax(1))


def plain_grad(problem: KernelProblem, dtype: torch.dtype, triple: Coefficients) -> Tensor:
    """dL/dx by autograd; -inf logits count as very negative ones, since autograd makes NaN of 0 times -inf."""
    problem = replace(problem, x=problem.x.double().clamp_min(-1e6).to(dtype))
    leaf, stats = plain(problem, dtype)
    terms = zip(triple, (stats.logp, stats.entropy, stats.lse), strict=True)
    total = sum((c.to(dtype) * s).sum() for c, s in terms if c is not None)
    return torch.autograd.grad(total, leaf)[0]


def run_stats(problem: KernelProblem, backend: str, outputs: tuple[str, ...] = STATISTICS) -> Stats:
    return run_all(problem, backend, outputs)[0]


def run_all(problem: KernelProblem, backend: str, outputs: tuple[str, ...] = STATISTICS) -> tuple[Stats, Tensor]:
    """Statistics, and the anchors that gradients are made from."""
    span = Span(0, problem.vocab_size)
    partials = library.row_stats(problem.x, problem.labels, problem.transform, span, outputs, backend)
    return finish(partials, problem.labels, problem.vocab_size, outputs)


def make(case: str, element: str, device: str) -> KernelProblem:
    return CASES[case].make(FLOATS[element], device)


def check(got: Tensor, naive: Tensor, truth: Tensor, what: str) -> None:
    """The accuracy rule; float64 has no better truth than itself, only another order of operations."""
    if got.dtype != torch.float64:
        assert_accurate(got, naive, truth, what)
        return
    finite = truth[truth.isfinite()]
    scale = finite.abs().amax().item() if finite.numel() else 0.0
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-11 * scale, msg=lambda text: f"{what}: {text}")


def coefficients(rows: int, device: str, which: str, dtype: torch.dtype) -> Coefficients:
    torch.manual_seed(1)
    values = torch.randn(3, rows).to(device, dtype)
    return Coefficients(*(v if name in which else None for name, v in zip("cel", values, strict=True)))


def wide_dtype(backend: str, device: str, element: str) -> torch.dtype:
    interpreted_or_skip(backend, device)
    return torch.float64 if element == "fp64" else torch.float32


@pytest.mark.pairwise(backend="reference")
@on_backends(*FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_statistics(case, element, backend, device):
    wide = wide_dtype(backend, device, element)
    problem = make(case, element, device)
    stats = run_stats(problem, backend)
    _, truth = plain(problem, torch.float64)
    _, naive = plain(problem, wide)
    for name, value in stats.present().items():
        if name == "is_top1":
            assert torch.equal(value, truth.is_top1)
            continue
        assert value.dtype == wide
        check(value, getattr(naive, name).detach(), getattr(truth, name).detach(), name)


@pytest.mark.pairwise(backend="reference")
@on_backends("fp32", "bf16", "fp64")
@pytest.mark.parametrize("case", CASES)
def test_unscaled_tile(case, element, backend, device):
    """``row_softmax`` in place and into another tensor: the same statistics as ``row_stats``, and G = d logp / dx."""
    wide = wide_dtype(backend, device, element)
    problem = make(case, element, device)
    rows, span = problem.x.shape[0], Span(0, problem.vocab_size)
    triple = Coefficients(torch.ones(rows, device=device))
    truth, naive = plain_grad(problem, torch.float64, triple), plain_grad(problem, wide, triple)
    out = torch.full_like(problem.x, torch.nan)
    arguments = (problem.labels, problem.transform, span, STATISTICS)
    partials = library.row_softmax(problem.x, *arguments, out, backend)
    stats, _ = finish(partials, problem.labels, problem.vocab_size, STATISTICS)
    for name in ("logp", "entropy", "lse"):
        theirs = (getattr(plain(problem, dtype)[1], name).detach() for dtype in (wide, torch.float64))
        check(getattr(stats, name), *theirs, name)
    check(out[:, : span.width], naive.to(out.dtype), truth, "G")
    assert (out[:, span.width :] == 0).all()
    x = problem.x.clone()
    assert torch.equal(library.row_softmax(x, *arguments, None, backend), partials)
    assert torch.equal(x, out)


@pytest.mark.pairwise(backend="reference")
@on_backends("fp32", "bf16", "fp64")
@pytest.mark.parametrize("which", ["c", "cel", "e", "l"])
@pytest.mark.parametrize("case", CASES)
def test_gradient(case, which, element, backend, device):
    wide = wide_dtype(backend, device, element)
    problem = make(case, element, device)
    span = Span(0, problem.vocab_size)
    triple = coefficients(problem.x.shape[0], device, which, wide)
    truth, naive = plain_grad(problem, torch.float64, triple), plain_grad(problem, wide, triple)
    _, anchors = run_all(problem, backend)
    out = torch.full_like(problem.x, torch.nan)
    arguments = (problem.labels, problem.transform, span, anchors, triple)
    library.row_grad(problem.x, *arguments, out, backend)
    check(out[:, : span.width], naive.to(out.dtype), truth, "dL/dx")
    assert (out[:, span.width :] == 0).all()
    x = problem.x.clone()
    library.row_grad(x, *arguments, None, backend)
    assert torch.equal(x, out)


@backends
def test_tails_are_exact(backend, device):
    """A token that the model is sure of: log-prob and gradient keep their relative accuracy where 1 - p rounds to 0."""
    interpreted_or_skip(backend, device)
    margins = torch.tensor([5.0, 10.0, 15.0, 20.0, 30.0, 60.0], device=device)
    x = torch.zeros(6, 100, device=device)
    x[:, 7] = margins
    labels = torch.full((6,), 7, device=device)
    problem = KernelProblem(x, labels, CASES["flat"].make(torch.float32).transform, 100)
    d = torch.tensor(99.0).double().log() - margins.double().cpu()
    logp = -torch.log1p(d.exp())
    stats, anchors = run_all(problem, backend)
    torch.testing.assert_close(stats.logp.double().cpu(), logp, rtol=3e-6, atol=0)
    library.row_softmax(x, labels, problem.transform, Span(0, 100), ("logp",), None, backend)
    torch.testing.assert_close(x[:, 7].double().cpu(), -torch.expm1(logp), rtol=3e-6, atol=0)
    out = torch.empty_like(x)
    x[:] = 0.0
    x[:, 7] = margins
    triple = Coefficients(torch.ones(6, device=device))
    library.row_grad(x, labels, problem.transform, Span(0, 100), anchors, triple, out, backend)
    torch.testing.assert_close(out[:, 7].double().cpu(), -torch.expm1(logp), rtol=3e-6, atol=0)


@backends
def test_masked_target_and_fully_masked_row(backend, device):
    """A target at -inf has log-prob -inf and a finite gradient; a row without any class is NaN, alone."""
    interpreted_or_skip(backend, device)
    problem = CASES["flat"].make(torch.float32, device)
    rows = torch.arange(5, device=device)
    problem.x[rows[:2], problem.labels[:2]] = -torch.inf
    problem.x[2] = -torch.inf
    stats, anchors = run_all(problem, backend)
    assert (stats.logp[:2] == -torch.inf).all() and stats.entropy[:2].isfinite().all()
    assert stats.logp[2].isnan()
    assert all(v[3:].isfinite().all() for v in stats.present().values())
    span, ones = Span(0, 300), torch.ones(5, device=device)
    out = torch.empty_like(problem.x)
    library.row_softmax(problem.x, problem.labels, problem.transform, span, ("logp",), out, backend)
    assert (out[rows[:2], problem.labels[:2]] == 1).all() and out[[0, 1, 3, 4]].isfinite().all()
    triple = Coefficients(ones, ones, ones)
    library.row_grad(problem.x, problem.labels, problem.transform, span, anchors, triple, out, backend)
    assert out[[0, 1, 3, 4]].isfinite().all()


@backends
def test_nan_stays_in_its_row(backend, device):
    interpreted_or_skip(backend, device)
    problem = CASES["longer than a block"].make(torch.float32, device)
    clean = run_stats(problem, backend)
    problem.x[1, 8000] = torch.nan
    stats = run_stats(problem, backend)
    for name, value in stats.present().items():
        assert torch.equal(value[0], getattr(clean, name)[0])
        assert name == "is_top1" or value[1].isnan()
    library.row_softmax(problem.x, problem.labels, problem.transform, Span(0, 9001), ("logp",), None, backend)
    assert problem.x[0].isfinite().all() and problem.x[1].isnan().any()


@backends
def test_ties_belong_to_the_first_class(backend, device):
    interpreted_or_skip(backend, device)
    x = torch.zeros(4, 5, device=device)
    x[1:, 2] = 1.0
    x[2, 4] = x[3, 4] = 1.0
    labels = torch.tensor([0, 2, 4, 2], device=device)
    problem = KernelProblem(x, labels, CASES["flat"].make(torch.float32).transform, 5)
    assert run_stats(problem, backend).is_top1.tolist() == [True, True, False, True]


@backends
def test_ignored_rows_are_not_read(backend, device):
    interpreted_or_skip(backend, device)
    problem = CASES["usual"].make(torch.float32, device)
    problem.labels[2] = -100
    clean = run_stats(problem, backend)
    problem.x[2] = torch.nan
    (stats, anchors), span = run_all(problem, backend), Span(0, 1000)
    keep = [0, 1, 3, 4, 5, 6]
    assert all(torch.equal(v[keep], getattr(clean, n)[keep]) for n, v in stats.present().items())
    out = torch.full_like(problem.x, torch.nan)
    library.row_softmax(problem.x, problem.labels, problem.transform, span, ("logp",), out, backend)
    assert (out[2] == 0).all() and out.isfinite().all()
    ones = torch.ones(7, device=device)
    library.row_grad(problem.x, problem.labels, problem.transform, span, anchors, Coefficients(ones), None, backend)
    assert (problem.x[2] == 0).all() and problem.x.isfinite().all()


@backends
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_strided_and_misaligned_rows(offset, backend, device):
    interpreted_or_skip(backend, device)
    problem = CASES["softcap"].make(torch.bfloat16, device)
    memory = torch.full((5, 340), torch.nan, dtype=torch.bfloat16, device=device)
    x = memory[:, offset : offset + 300]
    x.copy_(problem.x)
    moved = replace(problem, x=x)
    for got, want in zip(
        run_stats(moved, backend).present().values(), run_stats(problem, backend).present().values(), strict=True
    ):
        assert torch.equal(got, want)
    arguments = (problem.labels, problem.transform, Span(0, 300), ("logp",), None, backend)
    library.row_softmax(x, *arguments)
    library.row_softmax(problem.x, *arguments)
    assert torch.equal(x, problem.x)
    assert memory[:, :offset].isnan().all() and memory[:, offset + 300 :].isnan().all()


@backends
def test_repeat_runs_are_bitwise_equal(backend, device):
    interpreted_or_skip(backend, device)
    problem = CASES["everything"].make(torch.float32, device)
    triple = coefficients(5, device, "cel", torch.float32)
    runs = []
    for _ in range(2):
        (stats, anchors), out = run_all(problem, backend), torch.empty_like(problem.x)
        library.row_grad(problem.x, problem.labels, problem.transform, Span(0, 700), anchors, triple, out, backend)
        runs.append([*stats.present().values(), out])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@backends
def test_asking_for_less_changes_nothing(backend, device):
    interpreted_or_skip(backend, device)
    problem = CASES["everything"].make(torch.float32, device)
    everything = run_stats(problem, backend)
    for name in STATISTICS:
        alone = run_stats(problem, backend, (name,))
        assert list(alone.present()) == [name]
        assert torch.equal(getattr(alone, name), getattr(everything, name))


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_two_to_the_31_elements(backend):
    """Row offsets are 64 bits: the last rows of a tensor of 2^31 + elements."""
    vocab, rows = 131072, 16400
    x = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda")
    x[-2:] = torch.randn(2, vocab, device="cuda")
    labels = torch.full((rows,), -100, device="cuda")
    labels[-2:] = 5
    transform = CASES["flat"].make(torch.float32).transform
    tail = KernelProblem(x[-2:].clone(), labels[-2:].clone(), transform, vocab)
    whole = KernelProblem(x, labels, transform, vocab)
    assert torch.equal(run_stats(whole, backend).logp[-2:], run_stats(tail, backend).logp)
    arguments = (transform, Span(0, vocab), ("logp",), None, backend)
    library.row_softmax(tail.x, tail.labels, *arguments)
    library.row_softmax(x, labels, *arguments)
    assert torch.equal(x[-2:], tail.x)
    assert (x[:-2] == 0).all()
