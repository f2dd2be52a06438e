"""Block sizes and warps of the Triton kernels: a table, not a search at import."""

from __future__ import annotations

import torch

__all__ = ["block_and_warps", "block_product_config", "launch_config"]

# columns at a time and warps: 8 or 16 elements a thread, in 16-byte accesses; row_softmax holds more and would spill
# at 16
_CONFIGS: dict[str, tuple[int, int]] = {"row_stats": (4096, 8), "row_softmax": (2048, 8), "row_grad": (4096, 8)}


def block_and_warps(kernel: str, width: int) -> tuple[int, int]:
    """Columns at a time, a power of two, and warps of a launch over rows of ``width`` columns."""
    block, warps = _CONFIGS[kernel]
    needed = max(64, 1 << (max(width, 1) - 1).bit_length())
    if needed >= block:
        return block, warps
    return needed, max(1, min(warps, needed // 256))


def launch_config(kernel: str, width: int) -> dict[str, int]:
    """The same as keyword arguments of a launch."""
    block, warps = block_and_warps(kernel, width)
    return {"BLOCK": block, "num_warps": warps}


def block_product_config(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """Columns of H at a time, warps and stages of a product of kept blocks; float32 operands are twice as wide and go
    without tensor cores.
    """
    if dtype == torch.float32:
        return {"BLOCK": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK": 128, "num_warps": 4 if kernel == "block_mm" else 8, "num_stages": 3}
