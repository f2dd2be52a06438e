"""Time, memory and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from bench.cases import Problem
from bench.ways import Way
from fused_po.diagnostics import peak_memory

Call = Callable[[], Any]


def step(way: Way, problem: Problem) -> Call:
    """Forward and backward; the gradients remain until the next call."""

    def call() -> None:
        for leaf in problem.leaves:
            leaf.grad = None
        way(problem)[0].backward()

    return call


def once(call: Call, device: str, ahead: bool = False) -> float:
    """Seconds of one call; with ``ahead`` of the device alone, the host's part hidden behind a wait in its queue."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if ahead:
        # cycles, about a millisecond
        torch.cuda._sleep(2_000_000)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def interleaved(
    calls: dict[str, Call], device: str, seconds: float, most: int = 30, ahead: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, in turns, for about so many seconds and at least five turns after a warm-up."""
    for call in calls.values():
        call()
    turn = sum(once(call, device) for call in calls.values())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(5, min(most, int(seconds / turn)))):
        for name, call in calls.items():
            times[name].append(once(call, device, ahead))
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Median and the 20th to 80th percentile, in milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    numbers = {"ms": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}
    return {name: round(1000 * value, 4) for name, value in numbers.items()} | {"repeats": len(times)}


def memory(way: Way, problem: Problem, device: str) -> dict[str, int]:
    """Bytes at the peak above what was alive before, and how much of that is not a gradient that remains."""
    for leaf in problem.leaves:
        leaf.grad = None
    peak = peak_memory(lambda: way(problem)[0].backward(), device)
    remains = sum(leaf.grad.nbytes for leaf in problem.leaves if leaf.grad is not None)
    return {"peak_bytes": peak, "scratch_bytes": peak - remains}


def floors(problem: Problem, device: str) -> tuple[dict[str, Call], int]:
    """What no way can beat: the bare products of the case over at most 8192 of its rows, and a large copy.

    Also the bytes that the copy reads and writes.
    """
    copy, traffic = large_copy(device)
    calls: dict[str, Call] = {"copy": copy}
    case = problem.case
    if case.gemms:
        hidden = problem.hidden.detach().flatten(0, 1)[:8192]
        weight = problem.weight.detach()
        tile = hidden @ weight.t()

        def products() -> None:
            torch.mm(hidden, weight.t(), out=tile)
            torch.mm(tile, weight)
            if case.gemms == 3:
                torch.mm(tile.t(), hidden)

        calls["gemms"] = products
    return calls, traffic


def large_copy(device: str) -> tuple[Call, int]:
    """A copy far larger than any cache, and the bytes that it reads and writes."""
    # random: zeros may move faster
    source = torch.rand(1 << (29 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), source.nbytes + target.nbytes


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """What the numbers depend on besides the code; ``commit`` is recorded where git can't tell."""
    packages = {name: _version(name) for name in ("triton", "trl", "transformers", "liger-kernel", "quack-kernels")}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        # of other work: parallel regions wait for threads that are not running, ten times as long as they compute
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit() or commit or None,
    } | packages


def _commit() -> str | None:
    try:
        call = ["git", "describe", "--always", "--dirty", "--match="]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
