"""Products with a matrix of which only some blocks count: GEMM 2 and 3 without what is negligible.

A gradient tile (R, V) is cut into groups of rows and blocks of columns. ``kept_blocks`` says which of them count; a
backend is a module with ``GROUP`` rows, ``WIDTH`` columns, ``unsupported(kernel, tile) -> str | None`` and

``block_mm(tile, weight, kept, out)``
    ``out`` (R, H) <- kept blocks of ``tile`` (R, V) times ``weight`` (V, H).
``block_mm_t(tile, rows, kept, out)``
    ``out`` (V, H) += (kept blocks of ``tile``)^T times ``rows`` (R, H).

Operands are rounded to the dtype of the tile; products accumulate in the dtype of ``out``, which is contiguous.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fused_po.kernels.select import select

__all__ = ["BACKENDS", "block_mm", "block_mm_t", "choose", "kept_blocks", "leaves_out"]

BACKENDS = {"triton": f"{__package__}.triton_blocks", "reference": f"{__package__}.reference_blocks"}
# shares are added as whole numbers of this: an order of additions that does not matter needs no deterministic mode
UNIT = 2.0**-40

logger = logging.getLogger("fused_po")

# rows whose masses are looked at together, a multiple of every backend's group
SLAB = 1024


def leaves_out(device: torch.device, backend: str | None) -> bool:
    """Whether blocks are left out of products on a device.

    On a GPU only where a backend is named, and a warning says so. Products on tensor cores take groups of 64 rows, each
    with places of its own where it is not negligible: of real rows such groups keep 62 to 100 % of the blocks.
    """
    if device.type != "cuda" or backend is not None or os.environ.get("FUSED_PO_BACKEND"):
        return True
    if not torch.compiler.is_compiling():
        _tell_that_nothing_is_dropped()
    return False


def choose(tile: Tensor, max_dropped_mass: float, backend: str | None) -> Tensor:
    """Keep as few blocks of a gradient tile (R, V) as the bound allows, in the sizes of the backend: ``kept_blocks``.

    Raises:
        ValueError: a named backend that has no such products.
    """
    return torch.ops.fused_po.kept_blocks.default(tile, max_dropped_mass, backend)


def kept_blocks(tile: Tensor, max_dropped_mass: float, group: int, width: int) -> Tensor:
    """The blocks that a gradient tile can't do without.

    A group's blocks are dropped in the order of their largest share of any of its rows, for as long as no row loses
    more than ``max_dropped_mass`` of its L1 mass ``sum_v |dL/dx_v|``, which is 2 (1 - p_y) times coefficient and slope
    for a loss in logp. A fixed threshold, as in Cut Cross-Entropy (arXiv 2411.09009), would drop all of a flat row.

    Args:
        tile: (R, V).
        max_dropped_mass: share in [0, 1).
        group: rows that are kept or dropped together.
        width: columns of a block.

    Returns:
        (ceil(R / group), ceil(V / width)) bool. A row that is not finite keeps its blocks.
    """
    count, vocab = tile.shape
    blocks = -(-vocab // width)
    # what rounding in the masses may hide
    bound = max_dropped_mass * (1.0 - (blocks + width) * torch.finfo(torch.float32).eps)
    found = []
    for first in range(0, count, SLAB):
        masses = _masses(tile[first : first + SLAB], width)  # (S, K)
        total = masses.sum(1, keepdim=True)
        # a row without any gradient loses nothing, one that is not finite must show
        share = torch.where(total == 0, 0.0, torch.where(total.isfinite(), masses / total, torch.nan))
        short = -share.shape[0] % group
        share = torch.nn.functional.pad(share, (0, 0, 0, short)).unflatten(0, (-1, group))  # (G, group, K)
        order = share.amax(1).argsort(1)  # (G, K)
        # rounded up; more than any bound where it is not finite
        units = torch.where(share.isfinite(), share, 2.0).double().div(UNIT).ceil().to(torch.int64)
        lost = units.gather(2, order.unsqueeze(1).expand_as(units)).cumsum(2).amax(1)  # (G, K)
        found.append(torch.ones_like(order, dtype=torch.bool).scatter_(1, order, lost > int(bound / UNIT)))
    return torch.cat(found) if found else tile.new_ones((0, blocks), dtype=torch.bool)


def block_mm(tile: Tensor, weight: Tensor, kept: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """Kept blocks of ``tile`` (R, V) times ``weight`` (V, H): (R, H) in ``dtype``."""
    out = tile.new_empty((tile.shape[0], weight.shape[1]), dtype=dtype)
    torch.ops.fused_po.block_mm.default(tile, weight, kept, out, backend)
    return out


def block_mm_t(tile: Tensor, rows: Tensor, kept: Tensor, out: Tensor, backend: str | None) -> None:
    """``out`` (V, H) += (kept blocks of ``tile`` (R, V))^T times ``rows`` (R, H)."""
    torch.ops.fused_po.block_mm_t.default(tile, rows, kept, out, backend)


@cache
def _tell_that_nothing_is_dropped() -> None:
    logger.warning(
        "fused_po: max_dropped_mass is left unused on a GPU, where groups of rows keep most blocks: "
        "gradients are exact; backend='triton' drops all the same"
    )


def _masses(tile: Tensor, width: int) -> Tensor:
    """Sums of |tile| over blocks of columns: (S, V) -> (S, K) in at least float32."""
    full = tile.shape[1] // width * width
    dtype = torch.float64 if tile.dtype == torch.float64 else torch.float32
    parts = [torch.linalg.vector_norm(tile[:, :full].unflatten(1, (-1, width)), ord=1, dim=2, dtype=dtype)]
    if full < tile.shape[1]:
        parts.append(torch.linalg.vector_norm(tile[:, full:], ord=1, dim=1, keepdim=True, dtype=dtype))
    return torch.cat(parts, 1)


def _module(tile: Tensor, requested: str | None) -> ModuleType:
    return select("block_mm", tile, requested, BACKENDS)


@torch.library.custom_op("fused_po::kept_blocks", mutates_args=())
def _kept_blocks(tile: Tensor, max_dropped_mass: float, backend: str | None) -> Tensor:
    module = _module(tile, backend)
    return kept_blocks(tile, max_dropped_mass, module.GROUP, module.WIDTH)


@_kept_blocks.register_fake
def _kept_like(tile: Tensor, max_dropped_mass: float, backend: str | None) -> Tensor:
    module = _module(tile, backend)
    count, vocab = tile.shape
    return tile.new_empty((-(-count // module.GROUP), -(-vocab // module.WIDTH)), dtype=torch.bool)


@torch.library.custom_op("fused_po::block_mm", mutates_args=("out",))
def _block_mm(tile: Tensor, weight: Tensor, kept: Tensor, out: Tensor, backend: str | None) -> None:
    _module(tile, backend).block_mm(tile, weight, kept, out)


@torch.library.custom_op("fused_po::block_mm_t", mutates_args=("out",))
def _block_mm_t(tile: Tensor, rows: Tensor, kept: Tensor, out: Tensor, backend: str | None) -> None:
    _module(tile, backend).block_mm_t(tile, rows, kept, out)


@_block_mm.register_fake
@_block_mm_t.register_fake
def _nothing(tile: Tensor, *arguments: object) -> None:
    return None
