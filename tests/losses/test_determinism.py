"""Coefficients are the same bits in every run, on a GPU too: no operation that adds with atomics there.

What is seen here is which operations run, on the CPU; a GPU's own answer is in tests/gpu.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fused_po.losses.segments import spread, sum_segments
from fused_po.ops.coefficients import coefficients
from tests.losses.cases import CASES, create, make_batch

# on floats; torch.use_deterministic_algorithms names these for CUDA, or changes how they run
ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "put", "histc", "bincount", "cumsum", "cumprod", "index_reduce")
LENGTHS = [5, 1, 3, 2, 4, 6]


class Recorder(TorchDispatchMode):
    """Names of the operations on floats."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in args):
            self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_no_loss_adds_with_atomics(case, masked):
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS, masked=masked)
    with Recorder() as recorder:
        coefficients(loss, stats, batch)
    assert len(recorder.names) > 1
    assert recorder.names.isdisjoint(ATOMIC)


def test_the_recorder_sees_what_it_is_for():
    values = torch.rand(3, dtype=torch.float64, requires_grad=True)
    with Recorder() as recorder:
        values.repeat_interleave(torch.tensor([2, 0, 3]), output_size=5).sum().backward()
    assert not recorder.names.isdisjoint(ATOMIC)


@pytest.mark.parametrize("segments", [[3, 0, 2], [1], [0, 0], [], [4, 1, 1, 7]])
def test_spread_and_its_derivatives(segments):
    lengths, count = torch.tensor(segments, dtype=torch.int64), sum(segments)
    values = torch.rand(len(segments), dtype=torch.float64, requires_grad=True)
    found = spread(values, lengths, count)
    assert torch.equal(found, values.repeat_interleave(lengths))
    if count:
        assert gradcheck(lambda x: spread(x, lengths, count), (values,))
        assert gradgradcheck(lambda x: spread(x, lengths, count).pow(2), (values,))
    flags = torch.arange(len(segments)) % 2 == 0
    assert torch.equal(spread(flags, lengths, count), flags.repeat_interleave(lengths))


def test_the_sum_of_a_long_sequence_keeps_its_digits():
    """In float64, as before: 65,536 tokens that nearly cancel."""
    count = 1 << 16
    lengths = torch.tensor([count - 1, 1])
    grad = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    spread(values, lengths, count).backward(grad)
    torch.testing.assert_close(values.grad[0], torch.tensor(math.fsum(grad[:-1].tolist()), dtype=torch.float64))
    assert values.grad[1] == grad[-1]


def test_functorch_and_compile():
    lengths = torch.tensor([3, 0, 2])
    values = torch.rand(3, dtype=torch.float64)

    def total(x: torch.Tensor) -> torch.Tensor:
        return sum_segments(spread(x, lengths, 5).pow(2), lengths).sum()

    want = 2 * lengths * values
    torch.testing.assert_close(torch.func.grad(total)(values), want)
    compiled = torch.compile(torch.func.grad_and_value(total), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values)[0], want)
