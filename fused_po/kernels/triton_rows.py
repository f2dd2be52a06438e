"""The kernels in Triton: one program a row, float32 arithmetic, no atomics.

Compiled for CUDA tensors; interpreted on CPU tensors where ``TRITON_INTERPRET=1`` was set before the import, for tests.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_po.kernels.configs import launch_config
from fused_po.kernels.contract import PARTIALS, Coefficients, Span, Transform
from fused_po.kernels.triton_math import LOG2E, expm1, reciprocal, shifted_exp, to_logits

__all__ = ["device_of", "row_grad", "row_softmax", "row_stats", "unsupported"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _inverse(temperatures_ptr, inverse, row, HAS_TEMPERATURES: tl.constexpr):
    """1 / T of a row: an error in it is in every logit."""
    if HAS_TEMPERATURES:
        return reciprocal(tl.load(temperatures_ptr + row))
    return inverse


@triton.jit
def _sweep(
    x_row,
    target,
    width,
    inverse,
    softcap,
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of a row: the partials of ``contract.PARTIALS``, online over blocks of columns."""
    top = -float("inf")
    total = 0.0
    weighted = 0.0
    square = 0.0
    summed = 0.0
    before = -float("inf")
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = columns < width
        x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        z, _ = to_logits(x, inverse, softcap, logit_scale, HAS_SOFTCAP)
        if TOTAL:
            summed += tl.sum(tl.where(inside, z, 0.0))
        if BEFORE:
            before = tl.maximum(before, tl.max(tl.where(columns < tl.minimum(target, width), z, -float("inf"))))
        others = inside & (columns != target)
        z = tl.where(others, z, -float("inf"))
        best = tl.maximum(top, tl.max(z))
        # a row may begin with masked classes: the maximum starts at -inf, and -inf - -inf is NaN
        base = tl.where(best == -float("inf"), 0.0, best)
        shift = tl.where(top == -float("inf"), 0.0, top - base)
        scale = tl.where(top == -float("inf"), 0.0, tl.exp(shift))
        e, we = shifted_exp(z - base)
        if ENTROPY:
            weighted = scale * (weighted + shift * total) + tl.sum(we)
        if SQUARE:
            square = scale * scale * square + tl.sum(e * e)
        total = scale * total + tl.sum(e)
        top = best
    return top, total, weighted, square, summed, before


@triton.jit
def _target_logit(x_row, target, width, inverse, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """The target's logit, -inf where it is another shard's."""
    here = (target >= 0) & (target < width)
    x = tl.load(x_row + target, mask=here, other=0.0).to(tl.float32)
    z, _ = to_logits(x, inverse, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(here, z, -float("inf"))


@triton.jit
def _store_partials(partials_ptr, row, count, top, total, logit, weighted, square, summed, before):
    tl.store(partials_ptr + row, top)
    tl.store(partials_ptr + count + row, total)
    tl.store(partials_ptr + 2 * count + row, logit)
    tl.store(partials_ptr + 3 * count + row, weighted)
    tl.store(partials_ptr + 4 * count + row, square)
    tl.store(partials_ptr + 5 * count + row, summed)
    tl.store(partials_ptr + 6 * count + row, before)


@triton.jit(do_not_specialize=["count", "start", "inverse", "softcap", "logit_scale"])
def row_stats_kernel(
    x_ptr,  # (N, V)
    labels_ptr,  # (N,)
    temperatures_ptr,  # (N,)
    partials_ptr,  # (7, N)
    count,
    width,
    x_stride,
    start,
    inverse,
    softcap,
    logit_scale,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    # an ignored row is not read
    width = tl.where(label < 0, 0, width)
    target = label - start
    x_row = x_ptr + row * x_stride
    inv = _inverse(temperatures_ptr, inverse, row, HAS_TEMPERATURES)
    logit = _target_logit(x_row, target, width, inv, softcap, logit_scale, HAS_SOFTCAP)
    top, total, weighted, square, summed, before = _sweep(
        x_row, target, width, inv, softcap, logit_scale, HAS_SOFTCAP, ENTROPY, SQUARE, TOTAL, BEFORE, BLOCK
    )
    _store_partials(partials_ptr, row, count, top, total, logit, weighted, square, summed, before)


@triton.jit(do_not_specialize=["count", "start", "inverse", "softcap", "logit_scale"])
def row_softmax_kernel(
    x_ptr,  # (N, V)
    out_ptr,  # (N, columns), may be x
    labels_ptr,  # (N,)
    temperatures_ptr,  # (N,)
    partials_ptr,  # (7, N)
    count,
    width,
    out_width,
    x_stride,
    out_stride,
    start,
    inverse,
    softcap,
    logit_scale,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    width = tl.where(label < 0, 0, width)
    target = label - start
    x_row, out_row = x_ptr + row * x_stride, out_ptr + row * out_stride
    inv = _inverse(temperatures_ptr, inverse, row, HAS_TEMPERATURES)
    logit = _target_logit(x_row, target, width, inv, softcap, logit_scale, HAS_SOFTCAP)
    top, total, weighted, square, summed, before = _sweep(
        x_row, target, width, inv, softcap, logit_scale, HAS_SOFTCAP, ENTROPY, SQUARE, TOTAL, BEFORE, BLOCK
    )
    _store_partials(partials_ptr, row, count, top, total, logit, weighted, square, summed, before)
    # 1 - p_y from the margin, exact at both ends
    own = tl.div_rn(1.0, 1.0 + tl.exp(logit - top - tl.log(total)))
    own = tl.where(total == 0.0, 0.0, own)
    slope = logit_scale * inv
    rest = tl.where(total == 0.0, 0.0, tl.div_rn(own, total)) * -slope
    own = own * slope
    base = tl.where(top == -float("inf"), 0.0, top)
    # the second read of the row comes from the cache
    for first in range(0, out_width, BLOCK):
        columns = first + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = columns < width
        x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        z, bend = to_logits(x, inv, softcap, logit_scale, HAS_SOFTCAP)
        grad = tl.where(columns == target, own, rest * tl.exp(z - base)) * bend
        grad = tl.where(inside, grad, 0.0)
        tl.store(out_row + columns, grad.to(out_ptr.dtype.element_ty), mask=columns < out_width)


@triton.jit(do_not_specialize=["count", "start", "inverse", "softcap", "logit_scale"])
def row_grad_kernel(
    x_ptr,  # (N, V)
    out_ptr,  # (N, columns), may be x
    labels_ptr,  # (N,)
    temperatures_ptr,  # (N,)
    anchors_ptr,  # (4, N)
    c_ptr,  # (N,)
    e_ptr,  # (N,)
    l_ptr,  # (N,)
    count,
    width,
    out_width,
    x_stride,
    out_stride,
    start,
    inverse,
    softcap,
    logit_scale,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    width = tl.where(label < 0, 0, width)
    target = label - start
    x_row, out_row = x_ptr + row * x_stride, out_ptr + row * out_stride
    inv = _inverse(temperatures_ptr, inverse, row, HAS_TEMPERATURES)
    own = tl.load(anchors_ptr + row)
    shift = tl.load(anchors_ptr + count + row)
    gap = tl.load(anchors_ptr + 2 * count + row)
    c, e, l, entropy = 0.0, 0.0, 0.0, 0.0  # noqa: E741
    if HAS_C:
        c = tl.load(c_ptr + row)
    if HAS_L:
        l = tl.load(l_ptr + row)  # noqa: E741
    if HAS_E:
        e = tl.load(e_ptr + row)
        entropy = tl.load(anchors_ptr + 3 * count + row)
    slope = logit_scale * inv
    # at the target c (1 - p_y) comes as a whole: c - c p_y would cancel
    p_own = tl.exp(own)
    exact = (p_own * (l - e * (tl.where(p_own == 0.0, 0.0, own) + entropy)) - c * expm1(own)) * slope
    factor, weight = (l - c) * slope, -e * slope
    bits = gap * LOG2E
    for first in range(0, out_width, BLOCK):
        columns = first + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = columns < width
        x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        z, bend = to_logits(x, inv, softcap, logit_scale, HAS_SOFTCAP)
        above = z - shift
        if HAS_E:
            p = tl.exp(above + gap)
            # p log p is 0 where p is
            log_p = tl.where(p == 0.0, 0.0, above + gap)
            grad = p * tl.fma(log_p + entropy, weight, factor)
        else:
            grad = tl.exp2(tl.fma(above, LOG2E, bits)) * factor
        grad = tl.where(columns == target, exact, grad) * bend
        grad = tl.where(inside, grad, 0.0)
        tl.store(out_row + columns, grad.to(out_ptr.dtype.element_ty), mask=columns < out_width)


INTERPRETED = not isinstance(row_stats_kernel, triton.runtime.JITFunction)


def unsupported(kernel: str, x: Tensor) -> str | None:
    """Why the Triton kernels can't run a case, in words; None if they can."""
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.stride(1) != 1 and x.shape[1] > 1:
        return "columns must be contiguous"
    if x.is_cuda or (INTERPRETED and x.device.type == "cpu"):
        return None
    return f"it runs on a CUDA GPU (on a CPU with TRITON_INTERPRET=1), and the tensors are on {x.device.type!r}"


def row_stats(x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]) -> Tensor:
    """Partial statistics of each row, see ``contract``: one read."""
    count = x.shape[0]
    partials = x.new_empty((len(PARTIALS), count), dtype=torch.float32)
    if count:
        with device_of(x):
            row_stats_kernel[(count,)](
                x,
                labels,
                _pointer(transform.temperatures, partials),
                partials,
                count,
                span.width,
                x.stride(0),
                span.start,
                *_numbers(transform),
                **_flags(transform),
                **_wanted(outputs),
                **launch_config("row_stats", span.width, x.device),
            )
    return partials


def row_softmax(
    x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
) -> Tensor:
    """Partial statistics and the unscaled gradient tile, see ``contract``: two reads, the second from the cache, one
    write.
    """
    count = x.shape[0]
    partials = x.new_empty((len(PARTIALS), count), dtype=torch.float32)
    if count:
        with device_of(x):
            row_softmax_kernel[(count,)](
                x,
                out,
                labels,
                _pointer(transform.temperatures, partials),
                partials,
                count,
                span.width,
                out.shape[1],
                x.stride(0),
                out.stride(0),
                span.start,
                *_numbers(transform),
                **_flags(transform),
                **_wanted(outputs),
                **launch_config("row_softmax", out.shape[1], x.device),
            )
    return partials


def row_grad(
    x: Tensor,
    labels: Tensor,
    transform: Transform,
    span: Span,
    anchors: Tensor,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    """``out <- dL/dx`` from the coefficients, see ``contract``: one read, one write."""
    if x.shape[0] == 0:
        return
    with device_of(x):
        row_grad_kernel[(x.shape[0],)](
            x,
            out,
            labels,
            _pointer(transform.temperatures, anchors),
            anchors.contiguous(),
            *(_pointer(c, anchors) for c in coefficients),
            x.shape[0],
            span.width,
            out.shape[1],
            x.stride(0),
            out.stride(0),
            span.start,
            *_numbers(transform),
            **_flags(transform),
            HAS_C=coefficients.logp is not None,
            HAS_E=coefficients.entropy is not None,
            HAS_L=coefficients.lse is not None,
            **launch_config("row_grad", out.shape[1], x.device),
        )


def _pointer(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A tensor that the kernel won't read stands for one that is not there."""
    return placeholder if tensor is None else tensor.contiguous()


def _numbers(transform: Transform) -> tuple[float, float, float]:
    """1 / T, softcap and logit scale."""
    softcap = 1.0 if transform.softcap is None else transform.softcap
    return 1.0 / transform.temperature, softcap, transform.logit_scale


def _flags(transform: Transform) -> dict[str, bool]:
    return {"HAS_TEMPERATURES": transform.temperatures is not None, "HAS_SOFTCAP": transform.softcap is not None}


def _wanted(outputs: tuple[str, ...]) -> dict[str, bool]:
    """Which partials the statistics are made from; the others stay 0."""
    return {
        "ENTROPY": "entropy" in outputs,
        "SQUARE": "log_sum_sq_probs" in outputs,
        "TOTAL": "mean_logit" in outputs,
        "BEFORE": "is_top1" in outputs,
    }


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """A context in which launches go to the device of a tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
