"""Runs of ``fused-po train`` that are killed, each in a forked process.

A run is killed by SIGKILL after a time, or at its n-th operation on files that Python's audit events announce: opening,
renaming, making and removing. So a kill may fall between any two of them, in a checkpoint, in the log or in a cache.
It then comes at once, or from a timer within two milliseconds, when a file may be open and half written.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot
import torch
from transformers import LlamaForCausalLM

from fused_po.cli import compare, main
from fused_po.trainers import data, loading, preferences
from tests.forked import context

__all__ = ["Runs"]

# imported before a run begins
LOADED = (matplotlib, LlamaForCausalLM, compare, data, loading, preferences)
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.move")


class Runs:
    """Starts runs; ``folder`` holds what they write, caches included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = context().Value("i", 0)
        self._pipe, other = context().Pipe()
        # imports once, then forks for each run; ends with the pipe
        context().Process(target=_serve, args=(other, str(folder), self._count), daemon=True).start()
        other.close()

    def run(
        self,
        argv: list[str],
        seconds: float | None = None,
        event: int = 0,
        delay: float = 0.0,
        harm: Callable[[], None] | None = None,
        kinds: tuple[str, ...] = EVENTS,
    ) -> tuple[int, float, int]:
        """Run a command line; kill it after some seconds, or at an event, counted from 1, and a delay in seconds.

        Args:
            harm: called in the process instead of a kill at the event, at the start without one; of a module.
            kinds: of events that count.

        Returns:
            its exit code, -9 where it was killed; how long it ran; how many events there were.
        """
        self._pipe.send((600.0 if seconds is None else seconds, (argv, event, delay, harm, kinds)))
        code, taken = self._pipe.recv()
        return -signal.SIGKILL if code == -signal.SIGALRM else code, taken, self._count.value

    def said(self) -> str:
        """What the last run printed."""
        return (self.folder / "said").read_text(errors="replace")


def _serve(pipe: Any, folder: str, count: Any) -> None:
    while True:
        try:
            seconds, given = pipe.recv()
        except EOFError:
            return
        count.value = 0
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = _run(folder, count, *given)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        began, killed = time.monotonic(), False
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if not killed and time.monotonic() - began > seconds:
                os.kill(process, signal.SIGKILL)
                killed = True
            time.sleep(1e-3)
        pipe.send((os.waitstatus_to_exitcode(ended[1]), time.monotonic() - began))


def _run(
    folder: str,
    count: Any,
    argv: list[str],
    last: int,
    delay: float,
    harm: Callable[[], None] | None,
    kinds: tuple[str, ...],
) -> int:
    said = os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in kinds or not str(arguments[0]).startswith(folder):
            return
        count.value += 1
        if count.value == last and harm is not None:
            harm()
        elif count.value == last and delay > 0:
            # nothing handles it: the kernel ends the process
            signal.setitimer(signal.ITIMER_REAL, delay)
        elif count.value == last:
            os.kill(os.getpid(), signal.SIGKILL)

    if harm is not None and not last:
        harm()
    sys.addaudithook(note)
    return main(argv)
