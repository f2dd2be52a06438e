"""Block sizes and warps of the Triton kernels: a table, not a search at import.

``configs.json`` holds them by architecture; ``bench.tune`` measures candidates on a GPU and writes its entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

__all__ = [
    "KERNELS",
    "TABLE",
    "architecture",
    "block_and_warps",
    "block_product_config",
    "checked",
    "launch_config",
    "override",
    "row_options",
]

TABLE = Path(__file__).with_suffix(".json")
KERNELS = ("row_stats", "row_softmax", "row_grad")

Config = dict[str, int]

# Logits are products, and their differences must be those of the products as rounded: fused into one instruction, a
# row's largest logit would not be at distance 0 from the maximum. Where fusing is right, the kernels say so. Both are
# given since Triton's default is another from 3.10 on.
ROW_OPTIONS: Config = {"enable_fp_fusion": False}
PRODUCT_OPTIONS: Config = {"enable_fp_fusion": True}

_overrides: dict[str, Config] = {}


def architecture(device: torch.device) -> str:
    """``sm_90`` and the like; ``default`` where there is no CUDA GPU."""
    return "default" if device.type != "cuda" else _architecture(device.index)


@lru_cache
def _architecture(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@lru_cache
def _table() -> dict[str, dict[str, Config]]:
    return checked(TABLE.read_bytes())


def checked(text: str | bytes) -> dict[str, dict[str, Config]]:
    """A table from its JSON: by architecture and kernel, a power of two of columns and of warps.

    Raises:
        ValueError: it is another thing, or lacks a default.
    """
    try:
        found: dict[str, dict[str, Config]] = json.loads(text)
        for name in ("default", *found):
            for kernel in KERNELS if name == "default" else found[name]:
                block, warps = (found[name][kernel][key] for key in ("BLOCK", "num_warps"))
                if kernel not in KERNELS or block < 1 or block & (block - 1) or warps not in (1, 2, 4, 8, 16, 32):
                    raise ValueError(f"{name}, {kernel}: {block} columns, {warps} warps")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{TABLE} is no table of block sizes ({type(error).__name__}: {error})") from None
    return found


def block_and_warps(kernel: str, width: int, name: str = "default") -> tuple[int, int]:
    """Columns at a time, a power of two, and warps of a launch over rows of ``width`` columns.

    8 or 16 elements a thread, in 16-byte accesses, where nothing was measured; ``row_softmax`` holds more and would
    spill at 16.

    Args:
        name: the architecture.
    """
    table = _table()
    config = _overrides.get(kernel) or table.get(name, {}).get(kernel) or table["default"][kernel]
    block, warps = config["BLOCK"], config["num_warps"]
    needed = max(64, 1 << (max(width, 1) - 1).bit_length())
    if needed >= block:
        return block, warps
    return needed, max(1, min(warps, needed // 256))


def launch_config(kernel: str, width: int, device: torch.device) -> Config:
    """The same as keyword arguments of a launch, with the options that every launch has."""
    block, warps = block_and_warps(kernel, width, architecture(device))
    return {"BLOCK": block, "num_warps": warps, **row_options(kernel, block, warps)}


def row_options(kernel: str, block: int, warps: int) -> Config:
    """Options of the compiler. Left to itself it holds ``row_stats`` to 64 registers at 16 columns a thread and spills;
    with 80 as many blocks fit.
    """
    if kernel != "row_stats":
        return ROW_OPTIONS
    return {**ROW_OPTIONS, "maxnreg": max(80, 5 * block // (32 * warps))}


@contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Another configuration within, for tuning."""
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        _overrides.pop(kernel)
        if before is not None:
            _overrides[kernel] = before


def block_product_config(kernel: str, dtype: torch.dtype) -> Config:
    """Columns of H at a time, warps and stages of a product of kept blocks; float32 operands are twice as wide and go
    without tensor cores.
    """
    if dtype == torch.float32:
        return {"BLOCK": 32, "num_warps": 8, "num_stages": 2, **PRODUCT_OPTIONS}
    return {"BLOCK": 128, "num_warps": 4 if kernel == "block_mm" else 8, "num_stages": 3, **PRODUCT_OPTIONS}
