"""How much memory a call takes: the peak of what is alive while it runs, above what was alive before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_memory"]


def peak_memory(call: Callable[[], Any], device: torch.device | str | None = None) -> int:
    """The peak of memory alive while ``call()`` runs, above what was alive before, in bytes.

    Outputs that stay alive count, gradients included, and so does what a backward takes and gives back. Subtract the
    bytes of what remains to get the scratch of a call.

    On a GPU the number is that of torch's CUDA allocator, whose peak statistics are reset. On a CPU it is the running
    sum of every allocation and release that torch reports to its profiler, to the byte, while ``call`` runs under that
    profiler and therefore slower (about 0.1 ms for each small operation): time and memory need separate calls.

    Not seen: memory that does not come from torch's allocators (buffers inside BLAS, CUDA libraries and graphs, numpy,
    Python objects). On a CPU also: memory of threads started by ``call`` itself, and the release of memory that was
    alive before, so a call that replaces a tensor of the caller shows both.

    Args:
        call: takes nothing; what it returns is kept until the peak is known.
        device: where the memory is counted; default the current GPU, or the CPU where there is none.

    Raises:
        ValueError: a device that is neither a CPU nor a CUDA GPU.
        RuntimeError: on a CPU, where another profiler runs already.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    # garbage in cycles would be freed at any time
    gc.collect()
    if device.type == "cuda":
        return _cuda_peak(call, device)
    if device.type == "cpu":
        return _cpu_peak(call)
    raise ValueError(f"memory is counted on 'cpu' and 'cuda' devices: got {str(device)!r}")


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del kept
    return peak - before


def _cpu_peak(call: Callable[[], Any]) -> int:
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError("memory on a CPU is counted by torch's profiler, which is running already")
    # the profiler reports its own start and stop on stderr; its level is read once, at the first start
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        kept = call()
    del kept
    results = run.profiler.kineto_results if run.profiler is not None else None
    assert results is not None
    events = [e for e in results.events() if e.name() == MEMORY_EVENT_NAME and e.device_index() < 0]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
