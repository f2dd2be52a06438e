"""Seeds of a study side by side, in processes that end with it."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

__all__ = ["Outcome", "run_all"]

# between two looks at the processes
SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """A seed that has ended.

    Attributes:
        seed: which.
        error: what it failed with; None where its results are kept.
    """

    seed: int
    error: Exception | None


def run_all(
    seeds: Sequence[int],
    work: Callable[[int, Callable[[int], Any]], None],
    workers: int,
    progress: Callable[[int], Any],
) -> Generator[Outcome, None, None]:
    """Run ``work(seed, advance)`` for each seed, in as many processes as ``workers``.

    Args:
        seeds: in the order of their starts.
        work: keeps its own results; can be pickled.
        workers: 1 or more.
        progress: called twice a second with the sum of what all have told ``advance``.

    Yields:
        each seed as it ends, with the error that it ended in. The processes end with the iterator, whatever ends it.
    """
    # forking a process that uses threads is not safe
    context = get_context("spawn")
    done = context.Array("q", len(seeds), lock=False)
    waiting, ended = context.Queue(), context.Queue()
    for place, seed in enumerate(seeds):
        waiting.put((place, seed))
    for _ in range(workers):
        waiting.put(None)
    crew = [context.Process(target=_serve, args=(work, waiting, ended, done, workers)) for _ in range(workers)]
    left = set(seeds)
    try:
        with _deaf():
            for one in crew:
                one.start()
        while left:
            # what a process said before its end counts, so its end is looked at first
            lost = not any(one.is_alive() for one in crew)
            try:
                seed, error = ended.get(timeout=SECONDS)
            except queue.Empty:
                progress(sum(done))
                if not lost:
                    continue
                for seed in sorted(left):
                    yield Outcome(seed, RuntimeError("its process ended; out of memory?"))
                return
            left.discard(seed)
            yield Outcome(seed, error)
    finally:
        for one in crew:
            if one.is_alive():
                one.terminate()
        for one in crew:
            if one.pid is not None:
                one.join()
        waiting.cancel_join_thread()


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started here hear no Ctrl-C, which reaches all of a terminal: the first one speaks for them."""
    # only the main thread may say so
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(
    work: Callable[[int, Callable[[int], Any]], None], waiting: Any, ended: Any, done: Any, workers: int
) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    logging.disable_progress_bar()
    while (given := waiting.get()) is not None:
        place, seed = given

        def advance(updates: int, place: int = place) -> None:
            done[place] += updates

        try:
            work(seed, advance)
        # a seed that fails leaves the others alone, whatever it failed with
        except Exception as error:
            ended.put((seed, _sendable(error)))
        else:
            ended.put((seed, None))


def _sendable(error: Exception) -> Exception:
    """Of a kind that the parent knows, with the same words."""
    kind = next((one for one in (FloatingPointError, ValueError) if isinstance(error, one)), RuntimeError)
    return kind(str(error) or type(error).__name__)
