"""Products of kept blocks in Triton: a program owns its output, reads the list of blocks it needs, and uses no atomics.

Compiled for CUDA tensors; interpreted on CPU tensors where ``TRITON_INTERPRET=1`` was set before the import, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_po.kernels import triton_rows
from fused_po.kernels.configs import block_product_config

__all__ = ["GROUP", "WIDTH", "block_mm", "block_mm_t", "unsupported"]

GROUP, WIDTH = 64, 128


@triton.jit(do_not_specialize=["count", "listed"])
def block_mm_kernel(
    tile_ptr,  # (R, V)
    weight_ptr,  # (V, H)
    lists_ptr,  # (G, K), the blocks of each group, the kept ones first
    counts_ptr,  # (G,)
    out_ptr,  # (R, H)
    count,
    vocab,
    hidden,
    listed,
    tile_stride,
    weight_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    rows = group * GROUP + tl.arange(0, GROUP)  # (GROUP,)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) of H
    inside, wide = rows[:, None] < count, columns[None, :] < hidden
    total = tl.zeros((GROUP, BLOCK), tl.float32)
    for index in range(tl.load(counts_ptr + group)):
        block = tl.load(lists_ptr + group * listed + index)
        classes = block.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)  # (WIDTH,) of V
        part = tl.load(
            tile_ptr + rows[:, None] * tile_stride + classes[None, :],
            mask=inside & (classes[None, :] < vocab),
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + classes[:, None] * weight_stride + columns[None, :],
            mask=(classes[:, None] < vocab) & wide,
            other=0.0,
        )
        weight = weight.to(part.dtype)
        if WIDEN:
            part, weight = part.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(part, weight, total, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * hidden + columns[None, :], total, mask=inside & wide)


@triton.jit(do_not_specialize=["count", "listed"])
def block_mm_t_kernel(
    tile_ptr,  # (R, V)
    rows_ptr,  # (R, H)
    lists_ptr,  # (K, G), the groups of each block, those that keep it first
    counts_ptr,  # (K,)
    out_ptr,  # (V, H)
    count,
    vocab,
    hidden,
    listed,
    tile_stride,
    rows_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    classes = block * WIDTH + tl.arange(0, WIDTH)  # (WIDTH,) of V
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) of H
    inside, wide = classes[:, None] < vocab, columns[None, :] < hidden
    total = tl.zeros((WIDTH, BLOCK), tl.float32)
    groups = tl.load(counts_ptr + block)
    for index in range(groups):
        group = tl.load(lists_ptr + block * listed + index)
        rows = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)  # (GROUP,)
        # read as rows and turned in registers
        part = tl.load(
            tile_ptr + rows[:, None] * tile_stride + classes[None, :],
            mask=(rows[:, None] < count) & (classes[None, :] < vocab),
            other=0.0,
        )
        values = tl.load(
            rows_ptr + rows[:, None] * rows_stride + columns[None, :], mask=(rows[:, None] < count) & wide, other=0.0
        )
        values = values.to(part.dtype)
        if WIDEN:
            part, values = part.to(tl.float32), values.to(tl.float32)
        total = tl.dot(tl.trans(part), values, total, input_precision="ieee")
    if groups > 0:
        out = out_ptr + classes[:, None] * hidden + columns[None, :]
        mask = inside & wide
        tl.store(out, tl.load(out, mask=mask, other=0.0) + total, mask=mask)


def unsupported(kernel: str, tile: Tensor) -> str | None:
    """Why the Triton kernels can't run a case, in words; None if they can."""
    return triton_rows.unsupported(kernel, tile)


def block_mm(tile: Tensor, weight: Tensor, kept: Tensor, out: Tensor) -> None:
    """``out`` (R, H) <- kept blocks of tile times weight, see ``blocks``."""
    count, vocab = tile.shape
    if not count:
        return
    lists, counts = _lists(kept)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    config = block_product_config("block_mm", tile.dtype)
    with triton_rows.device_of(tile):
        block_mm_kernel[(kept.shape[0], triton.cdiv(out.shape[1], config["BLOCK"]))](
            tile,
            weight,
            lists,
            counts,
            out,
            count,
            vocab,
            out.shape[1],
            lists.shape[1],
            tile.stride(0),
            weight.stride(0),
            GROUP=GROUP,
            WIDTH=WIDTH,
            # the interpreter multiplies the bits of bfloat16
            WIDEN=triton_rows.INTERPRETED,
            **config,
        )


def block_mm_t(tile: Tensor, rows: Tensor, kept: Tensor, out: Tensor) -> None:
    """``out`` (V, H) += (kept blocks of tile)^T times rows, see ``blocks``."""
    count, vocab = tile.shape
    if not count:
        return
    lists, counts = _lists(kept.t())
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    config = block_product_config("block_mm_t", tile.dtype)
    with triton_rows.device_of(tile):
        block_mm_t_kernel[(kept.shape[1], triton.cdiv(out.shape[1], config["BLOCK"]))](
            tile,
            rows,
            lists,
            counts,
            out,
            count,
            vocab,
            out.shape[1],
            lists.shape[1],
            tile.stride(0),
            rows.stride(0),
            GROUP=GROUP,
            WIDTH=WIDTH,
            # the interpreter multiplies the bits of bfloat16
            WIDEN=triton_rows.INTERPRETED,
            **config,
        )


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a mask its True columns in order, then the others; and how many are True."""
    # a transposed mask would hand its strides on
    kept = kept.contiguous()
    return (~kept).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32), kept.sum(1, dtype=torch.int32)
