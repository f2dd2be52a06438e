"""A tensor times a number on the device, in Triton: a factor of 1 moves no memory, and nobody waits for it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_po.kernels.triton_rows import device_of

__all__ = ["scale", "unsupported"]

BLOCK = 8192


@triton.jit(do_not_specialize=["count"])
def scale_kernel(
    x_ptr,  # (count,)
    factor_ptr,  # ()
    count,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = places < count
        x = tl.load(x_ptr + places, mask=inside).to(tl.float32)
        tl.store(x_ptr + places, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


def unsupported(kernel: str, x: Tensor) -> str | None:
    """Why the kernel can't run a case, in words; None if it can."""
    if not x.is_cuda or x.dtype.itemsize > 4:
        return "only CUDA tensors of at most 4 bytes an element"
    return None if x.is_contiguous() else "only contiguous tensors"


def scale(x: Tensor, factor: Tensor) -> None:
    """``x`` times a number () in float32, in place."""
    if not x.numel():
        return
    with device_of(x):
        scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor.float(), x.numel(), BLOCK=BLOCK, num_warps=8)
