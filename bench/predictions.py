"""Writes bench/predictions.json: what the cases of a GPU should take, from FLOP and bytes, before they are measured.

    python -m bench.predictions

Written once for each design, not after a measurement: a prediction that follows the figure says nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from fused_po.bench.cases import Case, groups
from fused_po.diagnostics.prediction import predict_memory
from fused_po.ops.calls import GIB
from fused_po.ops.gradients import Wanted
from fused_po.ops.head import Head
from fused_po.ops.sweep import Budget

FILE = Path(__file__).parent / "predictions.json"
# an H200: large bf16 products of random data, and bytes read plus written by a large copy
FLOPS, BANDWIDTH = 750e12, 4.3e12


def chunk_rows(case: Case) -> int:
    """C: rows between two additions to dW."""
    scratch = case.scratch_bytes or GIB
    weight = torch.empty((case.vocab, case.hidden), dtype=case.dtype, device="meta")
    head = Head(weight, None, case.dtype, 1.0, None, 1.0, scratch // 8, None)
    budget = Budget.of(scratch, head, unscaled=True, wanted=Wanted(True, not case.frozen, False))
    rows = min(case.tokens, budget.whole)
    # whole pairs of equal sequences
    pair = 2 * case.length
    return rows if case.loss != "dpo" or rows < pair else rows // pair * pair


def predict(case: Case) -> dict[str, Any]:
    """Milliseconds by part, their sum over the bare products, and memory."""
    elements = case.tokens * case.vocab
    rows = chunk_rows(case)
    chunks = math.ceil(case.tokens / rows)
    gemms = case.gemms * 2 * elements * case.hidden / FLOPS
    # float32 logits instead of bfloat16 ones, read again, and the gradient tile written
    sweep = elements * (2 + 4 + 2) / BANDWIDTH
    # dW in float32, zeroed, then read and written by every chunk, then rounded
    head = case.vocab * case.hidden
    dw = 0.0 if case.frozen else head * (4 + 8 * chunks + 6) / BANDWIDTH
    memory = predict_memory(
        case.tokens,
        case.hidden,
        case.vocab,
        trainable=not case.frozen,
        dtype=case.dtype,
        device="cuda",
        scratch_bytes=case.scratch_bytes,
    )
    gradients = case.dtype.itemsize * (case.tokens * case.hidden + (0 if case.frozen else head))
    total = gemms + sweep + dw
    return {
        "case": case.name,
        "chunk_rows": rows,
        "gemms_ms": 1e3 * gemms,
        "sweep_ms": 1e3 * sweep,
        "dw_ms": 1e3 * dw,
        "ms": 1e3 * total,
        "over_gemms": total / gemms,
        "dw_share": 0.0 if case.frozen else 4 / 3 * FLOPS / (BANDWIDTH * rows),
        "scratch_bytes": memory.above_inputs - gradients,
    }


def main() -> None:
    known = groups("cuda")
    cases = [predict(case) for case in (*known["targets"], *known["pairs"])]
    found = {"flops": FLOPS, "bandwidth": BANDWIDTH, "method": "linear_loss", "cases": cases}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
