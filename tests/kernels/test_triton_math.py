"""Functions of the Triton kernels by themselves, interpreted, against float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_po.kernels.triton_math import expm1
from tests.kernels.test_rows import interpreted_or_skip


@triton.jit
def expm1_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out_ptr + places, expm1(tl.load(x_ptr + places)))


def test_expm1_keeps_its_digits_at_both_ends() -> None:
    interpreted_or_skip("triton", "cpu")
    # where the polynomial ends, and from numbers that are nearly 0 to those whose exponential is
    x = -torch.cat([torch.linspace(0.2, 0.5, 2048), torch.logspace(-30, 2, 2048)])
    found = torch.empty_like(x)
    expm1_kernel[(1,)](x, found, BLOCK=x.numel())
    truth = torch.expm1(x.double())
    # beyond the polynomial it is what the formula gives
    for here, naive in ((x > -0.35, torch.expm1(x)), (x <= -0.35, x.exp() - 1.0)):
        bound, error = (((value.double() - truth) / truth)[here].abs().max().item() for value in (naive, found))
        assert error <= 2 * bound + torch.finfo(torch.float32).eps
