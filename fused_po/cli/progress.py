"""Signs of life of a command: a bar on a terminal, elsewhere a line every few seconds, later twice a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

__all__ = ["Watch", "watched"]

# seconds without a word, where there is no terminal: at first, and of what has run for long
QUIET, QUIET_LATER = 4.0, 30.0


class Watch:
    """What is being done, for whoever waits.

    Attributes:
        what: in words.
        done: of the total.
    """

    def __init__(self, what: str, show: Callable[[Watch], None]) -> None:
        self.what, self.done, self._show = what, 0.0, show

    def say(self, what: str, done: float | None = None) -> None:
        """Something else is being done; ``done``: so much of the total is behind."""
        self.what = what
        self.done = self.done if done is None else done
        self._show(self)


@contextmanager
def watched(what: str, total: float | None = None) -> Iterator[Watch]:
    """A context whose work is shown on stderr while it runs.

    Args:
        what: in words.
        total: what ``done`` will be at the end; None: nobody knows.
    """
    if sys.stderr.isatty():
        with _bar(what, total) as (progress, task):
            yield Watch(what, lambda watch: progress.update(task, description=watch.what, completed=watch.done))
        return
    start, over = time.monotonic(), Event()
    watch = Watch(what, lambda watch: None)

    def speak() -> None:
        seconds = 0.0
        while not over.wait(min(max(QUIET, seconds / 20), QUIET_LATER)):
            seconds = time.monotonic() - start
            share = f", {100 * watch.done / total:.0f} %" if total else ""
            print(f"... {watch.what}{share}, {seconds:.0f} s", file=sys.stderr, flush=True)

    speaker = Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield watch
    finally:
        over.set()
        speaker.join()


@contextmanager
def _bar(what: str, total: float | None) -> Iterator[tuple[Any, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn()] if total else []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield progress, progress.add_task(what, total=total)
