"""Time, memory and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_po import __version__
from fused_po.bench.cases import Problem
from fused_po.bench.methods import Method
from fused_po.diagnostics.memory import peak_memory

__all__ = ["bare_products", "environment", "floors", "interleaved", "large_copy", "memory", "step", "summary"]

Call = Callable[[], Any]
PACKAGES = ("triton", "trl", "transformers", "liger-kernel", "quack-kernels", "cut-cross-entropy")
# rows of the bare products; more of them run at the same rate
FLOOR_ROWS = 8192
# seconds
LONG_TURN = 2.0


def step(method: Method, problem: Problem) -> Call:
    """Forward and backward; the gradients remain until the next call."""

    problem = method.problem(problem)

    def call() -> None:
        for leaf in problem.leaves:
            leaf.grad = None
        method.call(problem)[0].backward()

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
    """Seconds of each call, in turns, for about so many seconds after a warm-up: at least five turns, three if a turn
    takes seconds.
    """
    for call in calls.values():
        call()
    turn = sum(once(call, device) for call in calls.values())
    times: dict[str, list[float]] = {name: [] for name in calls}
    least = 5 if turn < LONG_TURN else 3
    for _ in range(max(least, min(most, int(seconds / turn)))):
        for name, call in calls.items():
            times[name].append(once(call, device, ahead))
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Median and the 20th to 80th percentile, in milliseconds."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    numbers = {"ms": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}
    return {name: round(1000 * value, 4) for name, value in numbers.items()} | {"repeats": len(times)}


def memory(method: Method, problem: Problem, device: str) -> dict[str, int]:
    """Bytes of one forward and backward above what was alive before.

    ``peak_bytes``; ``scratch_bytes``: how much of that is not a gradient that remains; ``tile_bytes``, of methods that
    hold tiles of the logits: how much is neither that nor the one dW in float32.
    """
    problem = method.problem(problem)
    peak = _peak(lambda: method.call(problem)[0].backward(), problem, device)
    gradients = [leaf.grad.nbytes for leaf in problem.leaves if leaf.grad is not None]
    found = {"peak_bytes": peak, "scratch_bytes": peak - sum(gradients)}
    if not method.tiled:
        return found
    if problem.case.from_logits or problem.case.frozen or problem.case.dtype.itemsize >= 4:
        return found | {"tile_bytes": found["scratch_bytes"]}
    # dW is rounded in the backward: before that there is the accumulator, after it both
    accumulator = 4 * problem.weight.numel()
    forward = _peak(lambda: method.call(problem), problem, device)
    tiles = max(forward - gradients[0], peak - sum(gradients)) - accumulator
    return found | {"tile_bytes": max(0, tiles)}


def _peak(call: Call, problem: Problem, device: str) -> int:
    for leaf in problem.leaves:
        leaf.grad = None
    return peak_memory(call, device)


def floors(problem: Problem, device: str) -> tuple[dict[str, Call], int]:
    """What no method can beat: the bare products of the case over at most ``FLOOR_ROWS`` of its rows, and a large copy.

    Also the bytes that the copy reads and writes.
    """
    copy, traffic = large_copy(device)
    calls: dict[str, Call] = {"copy": copy}
    case = problem.case
    if case.gemms:
        hidden = problem.hidden.detach().flatten(0, 1)[:FLOOR_ROWS]
        weight = problem.weight.detach()
        calls["gemms"] = bare_products(hidden, weight, case.gemms)
    return calls, traffic


def bare_products(hidden: Tensor, weight: Tensor, gemms: int) -> Call:
    """The 2 or 3 products of hidden states (N, H) and a weight (V, H) that no method can do without."""
    tile = hidden @ weight.t()  # (N, V)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=tile)
        torch.mm(tile, weight)
        if gemms == 3:
            torch.mm(tile.t(), hidden)

    return products


def large_copy(device: str) -> tuple[Call, int]:
    """A copy far larger than any cache, and the bytes that it reads and writes."""
    # random: zeros may move faster
    source = torch.rand(1 << (29 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), source.nbytes + target.nbytes


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """What the numbers depend on besides the code; ``commit`` None: what git says."""
    packages = {name: _version(name) for name in PACKAGES}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        # of other work: parallel regions wait for threads that are not running, ten times as long as they compute
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fused_po": __version__,
        "commit": commit or _commit(),
    } | packages


def _commit() -> str | None:
    """Of the repository that this file is kept in; the folder may be in another's, as that of an environment is."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--match=")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
