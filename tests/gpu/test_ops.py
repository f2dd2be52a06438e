"""The three operations on a GPU, in bfloat16: every route against float64, compiled, repeated, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fused_po import linear_loss, linear_token_stats, losses, make_plan, token_stats
from fused_po.diagnostics import peak_memory
from fused_po.losses import Loss
from fused_po.losses.batch import SIDE_INPUTS
from fused_po.ops.plain import plain_loss, plain_stats
from fused_po.stats import DIFFERENTIABLE
from fused_po.testing import assert_accurate
from tests.losses.cases import create, side_inputs

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPE = torch.bfloat16
# V is no multiple of a block, nor of the 16 bytes that aligned rows would need
S, H, V = 24, 64, 1031
PLENTY = 1 << 26
# a few tiles fit beside the rows in flight
TIGHT = 60_000

HEAD_FROZEN = frozenset({"weight", "bias"})
WEIGHT_FROZEN = frozenset({"weight"})


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Problem:
    """One call with masked positions, bias, a temperature per token and, if asked for, a softcap."""

    def __init__(self, loss: Loss, frozen: frozenset[str] = frozenset(), batch: int = 6, softcap: float | None = None):
        self.loss = loss
        self.labels = torch.randint(0, V, (batch, S), device=DEVICE)
        made = {
            "hidden": torch.randn(batch, S, H),
            "weight": 0.3 * torch.randn(V, H),
            "bias": torch.randn(V),
        }
        # half of the labels are likely ones
        likely = made["weight"][self.labels.cpu()] * (torch.rand(batch, S, 1) < 0.5)
        made["hidden"] += 1.5 * likely
        self.labels[torch.rand(batch, S, device=DEVICE) < 0.2] = -100
        self.transform = {
            "temperature": 0.5 + torch.rand(batch, S, device=DEVICE),
            "softcap": softcap,
            "logit_scale": 1.1,
        }
        self.leaves = {name: t.to(DEVICE, DTYPE).requires_grad_(name not in frozen) for name, t in made.items()}
        logp = self.stats(torch.float64).logp.detach()
        inputs = side_inputs(loss, self.labels.cpu(), logp.cpu())
        self.side_inputs = {name: t.to(DEVICE) for name, t in inputs.items()}
        assert set(inputs) == loss.needs & SIDE_INPUTS

    def trained(self) -> list[Tensor]:
        return [t for t in self.leaves.values() if t.requires_grad]

    def logits(self, dtype: torch.dtype) -> Tensor:
        hidden, weight, bias = (t.to(dtype) for t in self.leaves.values())
        logits = hidden @ weight.t() + bias
        # as plain torch has them: products in bfloat16, softmax in float32
        return logits if dtype == torch.float64 else logits.float()

    def stats(self, dtype: torch.dtype):
        return plain_stats(self.logits(dtype), self.labels, **self.transform)

    def run(self, **options):
        hidden, weight, bias = self.leaves.values()
        given = {**self.transform, **self.side_inputs, **options}
        return linear_loss(hidden, weight, self.labels, self.loss, bias=bias, **given)

    def check(self, value: Tensor, reference: Callable[[torch.dtype], Tensor]) -> None:
        """A value and its gradients, by the accuracy rule."""
        got = [value.detach(), *torch.autograd.grad(value, self.trained())]
        naive, truth = (
            [v.detach(), *torch.autograd.grad(v, self.trained())] for v in map(reference, (DTYPE, torch.float64))
        )
        names = ["value", *(name for name, t in self.leaves.items() if t.requires_grad)]
        for name, a, b, c in zip(names, got, naive, truth, strict=True):
            assert_accurate(a, b, c, name)

    def plain(self, dtype: torch.dtype) -> Tensor:
        return plain_loss(self.logits(dtype), self.labels, self.loss, **self.transform, **self.side_inputs)


# loss, sequences, frozen, scratch bytes
ROUTES = {
    "whole": ("sigmoid", 6, frozenset(), PLENTY),
    "chunks of pairs": ("sigmoid", 6, frozenset(), 8 * TIGHT),
    "chunks of tokens, entropy": ("dapo-all", 6, frozenset(), TIGHT),
    "deferred": ("sigmoid", 2, frozenset(), TIGHT),
    "kept tiles": ("ipo", 6, frozenset(), TIGHT),
    "recompute": ("ipo", 6, frozenset(), 0),
    "frozen": ("sigmoid", 6, HEAD_FROZEN, PLENTY),
    "frozen, over budget": ("sigmoid", 6, HEAD_FROZEN, 0),
    "frozen, trainable bias": ("sigmoid", 6, WEIGHT_FROZEN, TIGHT),
    "frozen, entropy": ("ppo-all", 6, HEAD_FROZEN, TIGHT),
}


@pytest.mark.parametrize("route", ROUTES)
def test_linear_loss(route):
    case, batch, frozen, scratch = ROUTES[route]
    problem = Problem(create(case), frozen, batch, softcap=20.0 if "entropy" in route else None)
    problem.check(problem.run(scratch_bytes=scratch).loss, problem.plain)


# outputs whose gradient arrives, frozen, scratch bytes
STATS_ROUTES = {
    "kept": (("logp",), frozenset(), PLENTY),
    "recompute": (("logp",), frozenset(), 0),
    "frozen": (("logp",), HEAD_FROZEN, TIGHT),
    "entropy": (DIFFERENTIABLE, frozenset(), TIGHT),
}


@pytest.mark.parametrize("route", STATS_ROUTES)
def test_linear_token_stats(route):
    through, frozen, scratch = STATS_ROUTES[route]
    problem = Problem(losses.create("sft"), frozen)
    weights = torch.randn(len(through), *problem.labels.shape, device=DEVICE)
    weights *= problem.labels >= 0

    def value(stats) -> Tensor:
        return torch.stack([(w * getattr(stats, name)).sum() for w, name in zip(weights, through, strict=True)]).sum()

    hidden, weight, bias = problem.leaves.values()
    outputs = ("logp", "entropy", "lse", "mean_logit", "log_sum_sq_probs", "max_logp")
    options = {"outputs": outputs, "scratch_bytes": scratch, **problem.transform}
    found = linear_token_stats(hidden, weight, problem.labels, bias=bias, **options)
    naive, truth = problem.stats(DTYPE), problem.stats(torch.float64)
    keep = problem.labels >= 0
    for name in outputs:
        got = getattr(found, name)
        assert got.dtype == torch.float32
        assert (got[~keep] == 0).all()
        assert_accurate(got[keep], getattr(naive, name)[keep], getattr(truth, name)[keep], name)
    problem.check(value(found), lambda dtype: value(problem.stats(dtype)))


@pytest.mark.parametrize("inplace", [False, True])
def test_token_stats_of_a_shifted_slice(inplace):
    labels = torch.randint(0, V, (3, S), device=DEVICE)
    leaf = (3 * torch.randn(3, S + 1, V, device=DEVICE)).to(DTYPE).requires_grad_()
    weights = torch.randn(2, 3, S, device=DEVICE)

    def value(stats) -> Tensor:
        return (weights[0] * stats.logp + weights[1] * stats.entropy).sum()

    # a copy, since the gradient may overwrite it
    logits = leaf * 1.0
    found = value(token_stats(logits[:, :-1], labels, outputs=("logp", "entropy"), inplace=inplace))
    naive, truth = (value(plain_stats(leaf[:, :-1].to(dtype), labels)) for dtype in (torch.float32, torch.float64))
    assert_accurate(found.detach(), naive.detach(), truth.detach(), "value")
    assert_accurate(*(torch.autograd.grad(v, leaf)[0] for v in (found, naive, truth)), "gradient")


@pytest.mark.large
def test_more_than_two_to_the_31_logits():
    rows, vocab = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    logits = torch.empty(rows, vocab, dtype=DTYPE, device=DEVICE).normal_().requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    logp = token_stats(logits, labels).logp
    last = logits.detach()[-3:].double().requires_grad_()
    truth = plain_stats(last, labels[-3:]).logp
    naive = plain_stats(last.detach().float(), labels[-3:]).logp
    assert_accurate(logp.detach()[-3:], naive, truth.detach())
    logp.sum().backward()
    (want,) = torch.autograd.grad(truth.sum(), last)
    assert_accurate(logits.grad[-3:], want.to(DTYPE), want)


@pytest.mark.parametrize("operation", ["linear_loss", "linear_token_stats", "token_stats"])
def test_fullgraph(operation):
    problem = Problem(create("sigmoid"))
    labels, transform = problem.labels, problem.transform

    def through(logp: Tensor) -> Tensor:
        return torch.sigmoid(logp.sum(-1)).sum()

    def of_linear_loss(hidden, weight, bias):
        given = {**transform, **problem.side_inputs, "bias": bias, "scratch_bytes": PLENTY}
        return linear_loss(hidden, weight, labels, problem.loss, **given).loss

    def of_linear_token_stats(hidden, weight, bias):
        return through(linear_token_stats(hidden, weight, labels, bias=bias, **transform).logp)

    def of_token_stats(hidden, weight, bias):
        return through(token_stats(hidden @ weight.t() + bias, labels, **transform).logp)

    function = {f.__name__: f for f in (of_linear_loss, of_linear_token_stats, of_token_stats)}[f"of_{operation}"]
    value = torch.compile(function, fullgraph=True)(*problem.leaves.values())
    keep = labels >= 0
    plain = lambda dtype: through(torch.where(keep, problem.stats(dtype).logp, 0.0))  # noqa: E731
    problem.check(value, problem.plain if operation == "linear_loss" else plain)


@pytest.mark.parametrize("route", ["whole", "deferred", "recompute", "frozen", "chunks of tokens, entropy"])
def test_no_waiting_with_a_plan(route):
    case, batch, frozen, scratch = ROUTES[route]
    problem = Problem(create(case), frozen, batch)
    plan = make_plan(problem.labels.cpu(), device=DEVICE)

    def step() -> None:
        problem.run(scratch_bytes=scratch, plan=plan).loss.backward()

    # kernels are compiled and loaded, which waits
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# losses whose weight of a token is one of its sequence, among others
@pytest.mark.parametrize("case", ["dapo-all", "luspo", "gmpo-entropy", "vespo", "rloo"])
def test_repeats_are_bitwise_equal(case):
    problem = Problem(create(case))
    runs = []
    for _ in range(3):
        out = problem.run(scratch_bytes=TIGHT)
        runs.append([out.loss, out.stats.logp, *torch.autograd.grad(out.loss, problem.trained())])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("case", ["sigmoid", "dapo"])
def test_memory_stays_within_its_budget(case):
    batch, length, width, vocab, scratch = 4, 512, 256, 16_384, 16 << 20
    loss = create(case)
    hidden = torch.randn(batch, length, width, device=DEVICE).to(DTYPE).requires_grad_()
    weight = (0.1 * torch.randn(vocab, width, device=DEVICE)).to(DTYPE).requires_grad_()
    labels = torch.randint(0, vocab, (batch, length), device=DEVICE)
    inputs = side_inputs(loss, labels.cpu(), torch.full(labels.shape, -9.0, dtype=torch.float64))
    inputs = {name: t.to(DEVICE) for name, t in inputs.items()}
    plan = make_plan(labels)

    def step() -> None:
        linear_loss(hidden, weight, labels, loss, scratch_bytes=scratch, plan=plan, **inputs).loss.backward()

    # libraries take their workspace once
    step()
    hidden.grad = weight.grad = None
    peak = peak_memory(step, DEVICE)
    accumulator, gradients = 4 * weight.numel(), hidden.grad.nbytes + weight.grad.nbytes
    # numbers per token, of which there are 2048
    small = 1 << 20
    assert peak - gradients - accumulator <= scratch + small


@pytest.mark.parametrize("frozen", [frozenset(), HEAD_FROZEN], ids=["trained", "frozen"])
def test_rows_without_advantage_are_found(frozen):
    problem = Problem(create("dapo"), frozen)
    problem.side_inputs["advantage"][:3] = 0.0
    problem.check(problem.run(scratch_bytes=PLENTY).loss, problem.plain)
    # with a plan nothing is looked for, and the result is the same
    problem.check(problem.run(scratch_bytes=PLENTY, plan=make_plan(problem.labels)).loss, problem.plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scratch", [0, PLENTY])
def test_no_row_loses_more_than_it_may(scratch, dtype):
    """The head is the identity: dH is the gradient tile."""
    tau, vocab = 1e-2, 2048
    logits = torch.randn(4, 100, vocab, device=DEVICE)
    logits.scatter_(2, torch.randint(vocab, (4, 100, 4), device=DEVICE), 16.0)
    labels = torch.randint(vocab, (4, 100), device=DEVICE)
    hidden, weight = logits.to(dtype).requires_grad_(), torch.eye(vocab, device=DEVICE, dtype=dtype).requires_grad_()

    def gradients(share: float, backend: str | None = "triton") -> list[Tensor]:
        loss, reference = losses.create("sigmoid"), torch.full((4,), -900.0, device=DEVICE)
        out = linear_loss(
            hidden,
            weight,
            labels,
            loss,
            ref_logp=reference,
            max_dropped_mass=share,
            scratch_bytes=scratch,
            backend=backend,
        )
        return [g.double() for g in torch.autograd.grad(out.loss, [hidden, weight])]

    (dh, dw), (exact_dh, exact_dw) = gradients(tau), gradients(0.0)
    mass = exact_dh.abs().sum(2)
    lost = (dh - exact_dh).abs().sum(2)
    assert bool((lost <= (tau + 4 * torch.finfo(dtype).eps) * mass).all())
    assert float((dh == 0).double().mean()) > float((exact_dh == 0).double().mean())
    assert float((dw - exact_dw).norm() / exact_dw.norm()) < 10 * tau
    # without a named backend nothing is dropped
    pairs = zip(gradients(tau, None), gradients(0.0, None), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
