"""Programs and ranks in processes of their own that import torch and its kind no more: a process that has is forked.

Only other packages are imported ahead. A program finds this one as it would in a fresh interpreter.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

__all__ = ["on_ranks", "python"]

# those of them that start no thread: what a fork leaves behind may hold a lock
AHEAD = ["pytest", "torch", "triton", "transformers", "peft", "trl"]


@cache
def context() -> ForkServerContext:
    """Of processes that are forked from one server, which starts with the first of them."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(AHEAD)
    return found


def python(*arguments: str, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """What ``python *arguments`` does in a folder: a script, ``-m MODULE`` or ``-c CODE``, with arguments."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        given = (arguments, cwd, {**os.environ, **environment}, out, err)
        process = context().Process(target=_program, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _program(arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    # as in conftest.py
    gc.freeze()
    os.chdir(cwd)
    kind, *others = arguments
    if kind == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *others[1:]]
        exec(others[0], {"__name__": "__main__"})
    else:
        sys.argv = [*arguments]
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


def on_ranks(function: Callable[..., None], count: int, folder: Path, *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` on so many ranks of a process group; what one raises is raised here."""
    from torch import multiprocessing as spawning

    context()
    given = (function, str(folder / "store"), count, arguments)
    ranks = spawning.start_processes(_rank, given, count, join=False, start_method="forkserver")
    while not ranks.join(timeout=300):
        pass


def _rank(rank: int, function: Callable[..., None], store: str, count: int, arguments: tuple[Any, ...]) -> None:
    from datetime import timedelta

    import torch
    from torch import distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=limit)
    function(rank, *arguments)
    dist.destroy_process_group()
    # torch.distributed.nn, imported on the way, holds the group as a default argument, and gloo's threads with it: they
    # abort an interpreter that tidies up; what was raised before has been handed to the parent
    os._exit(0)
