"""When fusing pays, in words: before a run what was found once, after it what this machine says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["BEFORE", "beside_eager", "over_bound"]

BEFORE = {
    "cpu": "On a CPU linear_loss takes less time than torch eager from about 4 million logits (tokens x vocabulary)\n"
    "on. Below, the fixed cost of a call, about a millisecond, shows. It takes less memory at every size.",
    "cuda": "A call has a fixed cost on the host: batches of a few hundred tokens do not show what a GPU can do.",
}


OVER = (
    "OVER THE BOUND: a result is off from float64 by more than twice what the softmax formulas are in that dtype.\n"
    "That method loses digits there; its time stands. A result of this project over the bound would not be reported."
)


def over_bound(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the mark in a case's table means, where some row has it."""
    return [OVER] if any(row["over_bound"] for result in results for row in result["methods"].values()) else []


def beside_eager(results: Sequence[dict[str, Any]]) -> list[str]:
    """Time and scratch of the fused route over torch eager's, a line for each case that has both.

    Args:
        results: of ``run_case``.
    """
    lines = []
    for result in results:
        shape, rows = result["shape"], result["methods"]
        ours = "token_stats" if shape["from_logits"] else "linear_loss"
        if not {ours, "eager"} <= set(rows):
            continue
        time, memory = (rows[ours][name] / rows["eager"][name] for name in ("ms", "scratch_bytes"))
        passes = " (eager is over the accuracy bound)" if rows["eager"]["over_bound"] else ""
        logits = shape["tokens"] * shape["vocab"] / 1e6
        lines.append(
            f"  {time:.2f} x the time and {memory:.2f} x the scratch, {ours}, {logits:.1f} million logits: "
            f"{result['case']}{passes}"
        )
    return ["Fused over torch eager:", *lines] if lines else []
