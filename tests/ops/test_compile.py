"""``torch.compile(fullgraph=True)`` of a step around each operation, and ``opcheck`` of ``token_stats``."""

from __future__ import annotations

import pytest
import torch

from fused_po import Split, losses, splits
from fused_po.ops import checks, linear_loss, linear_token_stats, make_plan, stats_loss, token_stats
from fused_po.ops.checks import TRACES
from fused_po.ops.coefficients import coefficients
from tests.losses.cases import create, make_batch
from tests.ops.problems import H, Problem, V, relative_error

needs_traces = pytest.mark.skipif(not TRACES, reason="only token_stats traces before torch 2.13")


def step(name: str, problem: Problem):
    """A training step's loss as a function of the leaves."""
    options = problem.options()

    def of_linear_loss(hidden, weight, bias):
        given = {**options, "bias": bias, **problem.side_inputs}
        return linear_loss(hidden, weight, problem.labels, problem.loss, scratch_bytes=20_000, **given).loss

    def of_statistics(hidden, weight, bias):
        given = {**options, "bias": bias, "outputs": ("logp", "entropy", "is_top1")}
        stats = linear_token_stats(hidden, weight, problem.labels, **given)
        return torch.sigmoid(stats.logp.sum(-1)).sum() - 0.1 * stats.entropy.mean()

    def of_logits(hidden, weight, bias):
        stats = token_stats(hidden @ weight.t() + bias, problem.labels, outputs=("logp", "entropy", "is_top1"))
        return torch.sigmoid(stats.logp.sum(-1)).sum() - 0.1 * stats.entropy.mean()

    return {"linear_loss": of_linear_loss, "linear_token_stats": of_statistics, "token_stats": of_logits}[name]


# a loss of each base
BASES = (
    *("kto", "bco-batch", "aot", "beta_dpo", "orpo", "mixture"),
    *("dapo-masks", "gmpo-entropy", "vespo", "asymre", "clip_cov"),
)


# inductor adds only compilation time to what the tracer shows, so it runs once; the losses themselves are traced by
# test_coefficients_trace, in a tenth of the time
@pytest.mark.parametrize(
    ("operation", "case", "backend"),
    [
        pytest.param("linear_loss", "sigmoid", "aot_eager", marks=needs_traces),
        pytest.param("linear_loss", "dapo-all", "aot_eager", marks=needs_traces),
        pytest.param("linear_loss", "simpo", "inductor", marks=needs_traces),
        *(pytest.param("linear_loss", case, "aot_eager", marks=[pytest.mark.nightly, needs_traces]) for case in BASES),
        pytest.param("linear_token_stats", "sft", "aot_eager", marks=needs_traces),
        ("token_stats", "sft", "aot_eager"),
    ],
)
def test_fullgraph(operation, case, backend):
    torch._dynamo.reset()
    problem = Problem(create(case))
    function = step(operation, problem)
    want = function(*problem.leaves)
    truth = torch.autograd.grad(want, problem.leaves)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    got = compiled(*problem.leaves)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, problem.leaves), truth, strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["sigmoid", "dapo-all", "simpo", *BASES])
def test_coefficients_trace(case, masked):
    """As the traced ``linear_loss`` makes them, from a batch as it is handed over."""
    torch._dynamo.reset()
    loss = create(case)
    stats, batch, _ = make_batch(loss, [3, 5, 0, 4], masked=masked)
    want, truth = coefficients(loss, stats, batch)
    got, found = torch.compile(lambda s, b: coefficients(loss, s, b), fullgraph=True, backend="eager")(stats, batch)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    for a, b in zip(found, truth, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < 1e-11


SPLITS = [
    pytest.param(splits.positive_only(), marks=pytest.mark.nightly),
    pytest.param(splits.no_reweighting(), marks=pytest.mark.nightly),
    Split(reweight="tertiles", population="batch"),
]


@needs_traces
@pytest.mark.parametrize("split", SPLITS)
def test_fullgraph_with_a_split(split):
    torch._dynamo.reset()
    problem = Problem(create("sigmoid"))

    def function(hidden, weight, bias):
        given = {**problem.options(), "bias": bias, **problem.side_inputs}
        fused = linear_loss(hidden, weight, problem.labels, problem.loss, split=split, **given).loss
        stats = linear_token_stats(
            hidden, weight, problem.labels, outputs=problem.loss.statistics, **{**problem.options(), "bias": bias}
        )
        return fused + stats_loss(stats, problem.labels, problem.loss, split=split, **problem.side_inputs).loss

    want = torch.autograd.grad(function(*problem.leaves), problem.leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*problem.leaves), problem.leaves), want, strict=True):
        assert relative_error(a, b) < 1e-11


@needs_traces
def test_fullgraph_with_a_plan_of_packed_sequences():
    torch._dynamo.reset()
    problem = Problem(losses.create("sigmoid"))
    hidden, weight, labels = problem.arguments()
    cu_seqlens = torch.arange(0, 55, 9)
    plan = make_plan(labels.flatten(), cu_seqlens=cu_seqlens)

    def function(hidden, weight):
        found = linear_loss(
            hidden,
            weight,
            labels.flatten(),
            problem.loss,
            plan=plan,
            bias=problem.tensors["bias"],
            **problem.side_inputs,
        )
        return found.loss

    flat = hidden.detach().flatten(0, 1).requires_grad_()
    want = torch.autograd.grad(function(flat, weight), (flat, weight))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(flat, weight), (flat, weight)), want, strict=True):
        assert relative_error(a, b) < 1e-11


# of linear_loss, test_all_that_varies_is_no_guard varies everything at once
OPERATIONS = [
    pytest.param("linear_loss", marks=[pytest.mark.nightly, needs_traces]),
    pytest.param("linear_token_stats", marks=needs_traces),
    "token_stats",
]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_new_length_compiles_once_more_at_most(operation):
    torch._dynamo.reset()
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    weight, loss = torch.randn(11, 8, requires_grad=True), losses.create("sigmoid")

    @torch.compile(fullgraph=True, backend=backend)
    def function(hidden, labels, ref_logp):
        if operation == "linear_loss":
            return linear_loss(hidden, weight, labels, loss, ref_logp=ref_logp).loss
        if operation == "linear_token_stats":
            return linear_token_stats(hidden, weight, labels).logp.sum()
        return token_stats(hidden @ weight.t(), labels).logp.sum()

    for length in (5, 6, 7, 8, 9):
        labels = torch.zeros(2, length, dtype=torch.int64)
        function(torch.randn(2, length, 8, requires_grad=True), labels, torch.zeros(2))
    # the first length, then any length
    assert compilations <= 2


def counting(function):
    """The compiled function, and the number of its compilations so far in a list."""
    found = [0]

    def backend(graph, inputs):
        found[0] += 1
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend), found


@pytest.mark.parametrize("operation", OPERATIONS)
def test_temperatures_that_vary_are_no_guards(operation):
    torch._dynamo.reset()
    problem = Problem(create("sigmoid"), softcap=None)

    def function(hidden, weight, temperature):
        options = {"temperature": temperature}
        if operation == "linear_loss":
            return linear_loss(hidden, weight, problem.labels, problem.loss, **options, **problem.side_inputs).loss
        if operation == "linear_token_stats":
            return linear_token_stats(hidden, weight, problem.labels, **options).logp.sum()
        return token_stats(hidden @ weight.t(), problem.labels, **options).logp.sum()

    compiled, count = counting(function)
    hidden, weight, _ = problem.arguments()
    for step in range(10):
        temperature = 0.55 + 0.1 * step
        torch.testing.assert_close(
            compiled(hidden, weight, temperature), function(hidden, weight, temperature), rtol=1e-11, atol=1e-12
        )
    assert count[0] <= 2


@needs_traces
@pytest.mark.nightly
@pytest.mark.parametrize("case", ["sigmoid", "dapo", "kto"])
def test_batch_sizes_that_vary_are_no_guards(case):
    torch._dynamo.reset()
    loss = create(case)
    weight = torch.randn(11, 8, requires_grad=True)

    def function(hidden, labels, side):
        return linear_loss(hidden, weight, labels, loss, scratch_bytes=1 << 20, **side).loss

    compiled, count = counting(function)
    for batch in range(2, 22, 2):
        problem = Problem(loss, batch=batch)
        labels = problem.labels.clamp_max(10)
        hidden = torch.randn(*labels.shape, 8, requires_grad=True)
        side = {
            name: value.to(torch.float32) if value.is_floating_point() else value
            for name, value in problem.side_inputs.items()
        }
        torch.testing.assert_close(compiled(hidden, labels, side), function(hidden, labels, side))
    assert count[0] <= 2


@needs_traces
@pytest.mark.parametrize("case", ["sigmoid", pytest.param("dapo", marks=pytest.mark.nightly)])
def test_all_that_varies_is_no_guard(case):
    """Batch size, length, temperature and the schedule of a split."""
    torch._dynamo.reset()
    loss, weight = create(case), torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    schedule = splits.controlled_dpo(positive=(1.0, 0.5), negative=(0.0, 1.0))

    def function(hidden, labels, side, temperature, split):
        options = {"temperature": temperature, "split": split, "scratch_bytes": 1 << 20}
        return linear_loss(hidden, weight, labels, loss, **options, **side).loss

    compiled, count = counting(function)
    for step in range(5):
        problem = Problem(loss, batch=2 * step + 2, length=step + 4)
        hidden = problem.tensors["hidden"]
        arguments = (hidden, problem.labels, problem.side_inputs, 0.55 + 0.1 * step, schedule.at(step / 5))
        got, want = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        leaves = (hidden, weight)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert relative_error(a, b) < 1e-11
    # the first call, then any other
    assert count[0] <= 2


@needs_traces
@pytest.mark.nightly
def test_schedules_of_a_split_are_no_guards():
    torch._dynamo.reset()
    problem = Problem(create("sigmoid"))
    schedule = splits.controlled_dpo(positive=(1.0, 0.5), negative=(0.0, 1.0))

    def function(hidden, weight, split):
        found = linear_loss(hidden, weight, problem.labels, problem.loss, split=split, **problem.side_inputs)
        return torch.autograd.grad(found.loss, weight)[0]

    def of_the_loss(hidden, weight, split):
        return linear_loss(hidden, weight, problem.labels, problem.loss, split=split, **problem.side_inputs).loss

    compiled, count = counting(of_the_loss)
    hidden, weight, _ = problem.arguments()
    for step in range(10):
        split = schedule.at(step / 10)
        got = torch.autograd.grad(compiled(hidden, weight, split), weight)[0]
        assert relative_error(got, function(hidden, weight, split)) < 1e-11
    assert count[0] <= 2


@pytest.mark.parametrize("outputs", ["logp,lse", "logp,entropy,lse,is_top1"])
def test_opcheck(outputs):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 6, -100], [3, -100, 1]])
    temperatures = torch.rand(6, dtype=torch.float64) + 0.5
    arguments = (logits, labels, temperatures, 1.0, 12.0, 1.1, outputs, False, None)
    torch.library.opcheck(torch.ops.fused_po.token_stats, arguments)
    # not a training step: the backward is an operator of its own
    values, anchors = torch.randn(3, 2, 3, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    arguments = (logits.detach(), labels, temperatures, 1.0, 12.0, 1.1, anchors, *values, None)
    torch.library.opcheck(torch.ops.fused_po.token_stats_backward, arguments)


@pytest.mark.parametrize("operation", ["linear_loss", "linear_token_stats"])
def test_older_versions_whose_gradient_would_be_0_are_refused(operation, monkeypatch):
    """As a whole graph; otherwise the call is left out of the graph, and its gradient right."""
    monkeypatch.setattr(checks, "TRACES", False)
    torch._dynamo.reset()
    problem = Problem(create("sigmoid" if operation == "linear_loss" else "sft"))
    function = step(operation, problem)
    with pytest.raises(RuntimeError, match=f"{operation} under torch.compile needs torch 2.13 or later"):
        torch.compile(function, fullgraph=True, backend="eager")(*problem.leaves)
    torch._dynamo.reset()
    got, want = (f(*problem.leaves) for f in (torch.compile(function, backend="aot_eager"), function))
    for a, b in zip(*(torch.autograd.grad(loss, problem.leaves) for loss in (got, want)), strict=True):
        assert relative_error(a, b) < 1e-11
