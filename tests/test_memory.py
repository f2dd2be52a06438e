"""``peak_memory`` against calls whose allocations are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_po.diagnostics import peak_memory

MIB = 1 << 20
# numbers in the arithmetic are wrapped in tensors of 4 or 8 bytes
SCALARS = 64


def floats(mib: float) -> torch.Tensor:
    return torch.empty(int(mib * MIB) // 4)


class Exchange(torch.autograd.Function):
    """A backward that holds 6 MiB for a moment, and returns its input's gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        scratch = floats(6)
        del scratch
        return grad.expand(MIB // 4)


def test_one_tensor():
    assert peak_memory(lambda: torch.empty(1000), "cpu") == 4000


def test_peak_is_what_is_alive_at_once():
    def call():
        first = floats(1)
        del first
        second, third = floats(2), floats(3)
        del second
        return third, floats(1)

    assert peak_memory(call, "cpu") == 5 * MIB


def test_memory_from_before_does_not_count():
    before = floats(8)
    assert peak_memory(lambda: before.add_(1), "cpu") <= SCALARS
    assert peak_memory(lambda: before * before, "cpu") == 8 * MIB


def test_memory_inside_operators_counts():
    matrix = torch.ones(512, 512)
    # a transposing copy goes through a small buffer that is no tensor of the caller
    assert MIB < peak_memory(lambda: matrix.t().reshape(-1), "cpu") < 1.1 * MIB


def test_backward_counts_and_gives_back():
    x = torch.zeros(MIB // 4, requires_grad=True)
    peak = peak_memory(lambda: Exchange.apply(x).backward(), "cpu")
    assert 6 * MIB <= peak <= 6 * MIB + SCALARS
    # what remains is the gradient: it counts, on top of nothing
    assert x.grad is not None
    remains = peak_memory(lambda: torch.autograd.grad((2 * x).sum(), x), "cpu")
    assert MIB <= remains <= 3 * MIB


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backward_through_a_checkpoint(use_reentrant):
    # a reentrant checkpoint runs a backward inside the backward
    x = torch.zeros(MIB // 4, requires_grad=True)

    def inner(x):
        scratch = torch.exp(x.detach().repeat(16))
        return x * scratch[0]

    def call():
        torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=use_reentrant).sum().backward()

    # repeat and exp, twice over in time
    assert 32 * MIB <= peak_memory(call, "cpu") <= 36 * MIB


def test_many_small_operations():
    def call():
        total = torch.zeros(256)
        for _ in range(12_000):
            total = total + 1
        return total

    # the old and the new total
    assert 2048 <= peak_memory(call, "cpu") <= 2048 + SCALARS


def test_numbers_do_not_depend_on_earlier_calls():
    kept = []
    first = peak_memory(lambda: kept.append(floats(4)), "cpu")
    second = peak_memory(lambda: kept.append(floats(4)), "cpu")
    assert first == second == 4 * MIB


def test_an_error_in_the_call_comes_out():
    def call():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak_memory(call, "cpu")
    assert peak_memory(lambda: floats(1), "cpu") == MIB


def test_refusals():
    with pytest.raises(ValueError, match="meta"):
        peak_memory(lambda: None, "meta")
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="running already"):
        peak_memory(lambda: None, "cpu")


def test_says_nothing_on_its_own():
    call = "peak_memory(lambda: torch.empty(9), 'cpu')"
    code = f"import torch; from fused_po.diagnostics import peak_memory; print({call})"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "36\n"
    assert "profiler" not in found.stderr.lower()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu():
    def call():
        first = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
        del first
        return torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")

    before = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    # the allocator hands out whole blocks, up to 1 MiB larger
    assert 32 * MIB <= peak_memory(call) <= 33 * MIB
    assert 64 * MIB <= peak_memory(lambda: before.clone()) <= 65 * MIB
