"""``main_grad``: dW is added to memory that the caller holds; and calls that are pending together."""

from __future__ import annotations

import pytest
import torch

from fused_po import linear_loss, linear_token_stats, losses
from fused_po.diagnostics import peak_memory
from tests.ops.problems import Problem, relative_error

PLENTY = 1 << 24


def call(operation: str, problem: Problem, scratch: int, **options):
    if operation == "linear_loss":
        return linear_loss(
            *problem.arguments(),
            problem.loss,
            scratch_bytes=scratch,
            **problem.options(),
            **options,
            **problem.side_inputs,
        ).loss
    stats = linear_token_stats(*problem.arguments(), scratch_bytes=scratch, **problem.options(), **options)
    return (stats.logp * torch.linspace(-1, 1, stats.logp.numel()).view(stats.logp.shape)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scratch", [2000, PLENTY])
@pytest.mark.parametrize("operation", ["linear_loss", "linear_token_stats"])
def test_backward_adds_to_it(operation, scratch, dtype):
    problem = Problem(losses.create("sigmoid"), dtype=dtype, softcap=None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    problem.temperature = problem.temperature.to(wide)
    before = torch.randn(problem.tensors["weight"].shape, dtype=wide)
    want = torch.autograd.grad(3.0 * call(operation, problem, scratch), problem.leaves)
    main = before.clone()
    value = 3.0 * call(operation, problem, scratch, main_grad=main)
    assert torch.equal(main, before)
    value.backward()
    assert problem.tensors["weight"].grad is None
    bound = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert relative_error(main - before, want[1]) <= bound
    assert relative_error(problem.tensors["hidden"].grad, want[0]) <= bound


@pytest.mark.parametrize(
    ("change", "frozen"),
    [({"dtype": torch.bfloat16}, False), ({"rows": 3}, False), ({"strided": True}, False), ({}, True)],
)
def test_refusals(change, frozen):
    problem = Problem(losses.create("sft"), frozenset({"weight"}) if frozen else frozenset(), dtype=torch.float32)
    vocab, width = problem.tensors["weight"].shape
    main = torch.zeros(change.get("rows", vocab), width, dtype=change.get("dtype", torch.float32))
    main = torch.zeros(width, vocab).t() if change.get("strided") else main
    with pytest.raises(ValueError, match="main_grad"):
        linear_token_stats(*problem.arguments(), main_grad=main)


def test_it_is_as_wide_as_what_products_accumulate_in():
    hidden, weight = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(11, 8, requires_grad=True)
    labels = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="main_grad must be .*float64"):
        linear_token_stats(hidden, weight, labels, main_grad=torch.zeros(11, 8))


def test_calls_that_are_pending_together():
    """Two forwards before one backward: their tiles wait twice, and gradients add up."""
    torch.manual_seed(0)
    hidden = [torch.randn(2, 100, 256, requires_grad=True) for _ in range(2)]
    weight = torch.randn(4000, 256, requires_grad=True)
    labels = torch.randint(0, 4000, (2, 100))
    loss = losses.create("dapo")

    def forwards(count: int):
        advantage = torch.tensor([1.0, -1.0])
        return [linear_loss(h, weight, labels, loss, advantage=advantage).loss for h in hidden[:count]]

    one, two = (peak_memory(lambda count=count: sum(forwards(count)), "cpu") for count in (1, 2))
    tile = 4 * 200 * 4000
    assert two - one == pytest.approx(tile, rel=0.1)
    sum(forwards(2)).backward()
    together = weight.grad.clone()
    alone = [torch.autograd.grad(value, weight)[0] for value in forwards(2)]
    torch.testing.assert_close(together, alone[0] + alone[1])
