"""The rows of ``fused-po profile``: predictions of all lengths at once, then measurements within a time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_po.cli.profile_report import TITLES, memory_words, time_words
from fused_po.cli.profile_steps import Steps, free_memory
from fused_po.cli.progress import Watch
from fused_po.diagnostics.memory import peak_memory
from fused_po.prices import Device

__all__ = ["measure", "predictions"]

Row = dict[str, Any]
# seconds above which a step is timed once
SLOW = 1.0
# steps that a measurement takes: one that loads and warms up, one that is timed, one whose memory is counted
STEPS = 3


def predictions(steps: Steps, lengths: Sequence[int], memory: int, on: Device | None = None) -> list[Row]:
    """A row for each length and route: predicted bytes, seconds on paper where a GPU is named, nothing measured.

    Args:
        lengths: tokens of a pair, ascending.
        memory: bytes; a length predicted to take more is not to be run.
        on: whose prices.
    """
    rows: list[Row] = []
    for length in lengths:
        for route in TITLES:
            parts = steps.predict(route, length)
            row: Row = {"route": route, "length": length, "predicted_bytes": sum(parts.values())}
            row |= {"paper_seconds": None, "peak_bytes": None, "seconds": None, "status": "", "parts": parts}
            if steps.longest is not None and length > steps.longest:
                row["status"] = f"not run: the model has positions for {steps.longest} tokens a pair"
            elif row["predicted_bytes"] > memory:
                row["status"] = "does not fit, as predicted"
            if on is not None:
                row["paper_seconds"] = steps.on_paper(route, length, on)
            rows.append(row)
    return rows


def measure(steps: Steps, rows: Sequence[Row], seconds: float, watch: Watch) -> None:
    """Run what fits, the shortest first, and write peak, seconds and status into the rows.

    Args:
        rows: from ``predictions``.
        seconds: in all; what is expected to take longer than what is left of them is not run.
        watch: is told what is run.
    """
    end = time.monotonic() + seconds
    pace: dict[str, float] = {}
    for row in rows:
        if row["status"]:
            continue
        route, length = row["route"], row["length"]
        if row["predicted_bytes"] > free_memory(steps.device):
            row["status"] = "not run: more than is free on this machine"
            continue
        if route not in pace:
            watch.say(f"{TITLES[route]}: how long a step may take")
            pace[route] = steps.pace(route)
        expected, left = STEPS * pace[route] * length, end - time.monotonic()
        if expected > left:
            row["status"] = f"not run: about {expected:.0f} s, and {max(0.0, left):.0f} of --seconds are left"
            continue
        watch.say(f"{TITLES[route]}, {length} tokens, about {expected:.0f} s", seconds - left)
        try:
            row["peak_bytes"], row["seconds"] = _measured(steps, route, length)
            pace[route] = row["seconds"] / length
            row["status"] = "measured"
            print(
                f"{TITLES[route]}, {length} tokens: {time_words(row['seconds'])}, {memory_words(row['peak_bytes'])}",
                flush=True,
            )
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            row["status"] = "out of memory"
        gc.collect()


def _measured(steps: Steps, route: str, length: int) -> tuple[int, float]:
    step = steps.make(route, length)
    times = [_seconds(step, steps.device)]
    # the first loads and warms up
    times = [_seconds(step, steps.device) for _ in range(3 if times[0] < SLOW else 1)]
    steps.forget()
    # two of them would need more than one is predicted to
    del step
    step = steps.make(route, length)
    return peak_memory(step, steps.device) + steps.held(route, length), statistics.median(times)


def _seconds(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
