"""From G = d logp / dx to dL/dx in Triton: an entropy's gradient without the logits, one read and one write.

Compiled for CUDA tensors; interpreted on CPU tensors where ``TRITON_INTERPRET=1`` was set before the import, for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_po.kernels import triton_rows
from fused_po.kernels.configs import launch_config
from fused_po.kernels.contract import Coefficients, Span, Transform
from fused_po.kernels.triton_math import expm1

__all__ = ["row_regrad", "unsupported"]


@triton.jit(do_not_specialize=["count", "start", "inverse", "logit_scale"])
def row_regrad_kernel(
    tile_ptr,  # (N, columns)
    labels_ptr,  # (N,)
    temperatures_ptr,  # (N,)
    anchors_ptr,  # (4, N)
    c_ptr,  # (N,)
    e_ptr,  # (N,)
    l_ptr,  # (N,)
    count,
    width,
    columns,
    tile_stride,
    start,
    inverse,
    logit_scale,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    width = tl.where(label < 0, 0, width)
    target = label - start
    tile_row = tile_ptr + row * tile_stride
    slope = logit_scale * inverse
    if HAS_TEMPERATURES:
        slope = logit_scale / tl.load(temperatures_ptr + row)
    own = tl.load(anchors_ptr + row)
    factor = 0.0
    if HAS_L:
        factor += tl.load(l_ptr + row)
    if HAS_C:
        c = tl.load(c_ptr + row)
        factor -= c
    if HAS_E:
        e = tl.load(e_ptr + row)
        entropy = tl.load(anchors_ptr + 3 * count + row)
    for first in range(0, columns, BLOCK):
        places = first + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = places < width
        # G = -p J at the classes other than the target
        p = tl.load(tile_row + places, mask=inside, other=0.0).to(tl.float32) / -slope
        is_target = places == target
        p = tl.where(is_target, tl.exp(own), p)
        bracket = factor
        if HAS_E:
            # p log p is 0 where p is
            log_p = tl.where(p == 0.0, 0.0, tl.where(is_target, own, tl.log(p)))
            bracket = factor - e * (log_p + entropy)
        grad = p * bracket
        if HAS_C:
            # at the target p (bracket + c) leaves out c, which comes as c (1 - p_y)
            grad = tl.where(is_target, p * (bracket + c) - c * expm1(own), grad)
        grad = tl.where(inside, grad * slope, 0.0)
        tl.store(tile_row + places, grad.to(tile_ptr.dtype.element_ty), mask=places < columns)


def unsupported(kernel: str, tile: Tensor) -> str | None:
    """Why the kernel can't run a case, in words; None if it can."""
    return triton_rows.unsupported(kernel, tile)


def row_regrad(
    tile: Tensor, labels: Tensor, transform: Transform, span: Span, anchors: Tensor, coefficients: Coefficients
) -> None:
    """G becomes ``dL/dx``, see ``contract``: one read, one write."""
    count = tile.shape[0]
    if count == 0:
        return
    anchors = anchors.contiguous()
    # what the kernel won't read needs a pointer all the same
    c, e, l = (anchors if given is None else given.contiguous() for given in coefficients)  # noqa: E741
    with triton_rows.device_of(tile):
        row_regrad_kernel[(count,)](
            tile,
            labels,
            anchors if transform.temperatures is None else transform.temperatures.contiguous(),
            anchors,
            c,
            e,
            l,
            count,
            span.width,
            tile.shape[1],
            tile.stride(0),
            span.start,
            1.0 / transform.temperature,
            transform.logit_scale,
            HAS_TEMPERATURES=transform.temperatures is not None,
            HAS_C=coefficients.logp is not None,
            HAS_E=coefficients.entropy is not None,
            HAS_L=coefficients.lse is not None,
            **launch_config("row_grad", tile.shape[1], tile.device),
        )
