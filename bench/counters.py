"""The section of docs/performance.md on what a logit costs on paper: executed PTX beside what a GPU can issue.

The counts come from ``python -m tests.kernels.ptx.count --write``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fused_po.prices import device

__all__ = ["section"]

COUNTS = Path(__file__).with_name("counts.json")
# an H200: multiprocessors, clock, and what one of them issues in a clock
MULTIPROCESSORS, CLOCK = 132, 1.98e9
LANES, SPECIAL_LANES = 4 * 32, 16
BANDWIDTH = device("h200").bandwidth
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BACKENDS = {"cuda": "CUDA", "triton": "Triton"}
WANTED = {
    "row_grad": {"logp": "c", "entropy": "c and e"},
    "": {"logp": "log-prob", "entropy": "and entropy", "everything": "all"},
}


def per_byte(lanes: int) -> float:
    """Lane-instructions that can be issued while a byte moves."""
    return MULTIPROCESSORS * lanes * CLOCK / BANDWIDTH


def section() -> list[str]:
    rows = json.loads(COUNTS.read_text(encoding="utf-8"))["kernels"]
    lines = [
        "## What a logit costs, on paper",
        "",
        "Counted by `python -m tests.kernels.ptx.count --write`, which executes the PTX that nvcc and Triton emit",
        "for sm_90 on rows of two widths and takes the difference. An instruction counts for all lanes of its warp;",
        "moves, which the assembler drops, do not count. No GPU was asked. While a byte moves at",
        f"{BANDWIDTH / 1e12:.1f} TB/s an H200 can issue {per_byte(LANES):.1f} lane-instructions, of them",
        f"{per_byte(SPECIAL_LANES):.2f} of special functions (`ex2`, `rcp`, division). The last column is the larger",
        "share of the two that a kernel takes while each logit is read once and its gradient written once: well",
        "below 100 % it is bound by memory, above by instructions. Triton's `row_softmax` reads twice, the second time",
        "mostly from the L2 cache.",
        "",
        "| kernel | logits, gradient | softcap | wanted | backend | instructions | special | bytes read | written | "
        "share of what can be issued |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *(_line(row) for row in rows), ""]


def _line(row: dict[str, Any]) -> str:
    moved = BYTES[row["element"]] + (0 if row["kernel"] == "row_stats" else BYTES[row["out"]])
    share = max(row["instructions"] / per_byte(LANES), row["special"] / per_byte(SPECIAL_LANES)) / moved
    types = row["element"] if row["kernel"] == "row_stats" else f"{row['element']}, {row['out']}"
    wanted = WANTED.get(row["kernel"], WANTED[""])[row["wanted"]]
    cells = [f"`{row['kernel']}`", types, "yes" if row["softcap"] else "", wanted, BACKENDS[row["backend"]]]
    cells += [f"{row[name]:.1f}" for name in ("instructions", "special", "read", "written")]
    return f"| {' | '.join(cells)} | {100 * share:.0f} % |"
