"""Which warps run next, and for how long: drawn, in a way that differs from seed to seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.threads import READY, Threads

__all__ = ["ORDERS", "Scheduler"]

Array = npt.NDArray[Any]
# together: mostly all warps side by side, the fastest here; mixed: any set of warps; alone: one warp as far as it gets;
# laggard: one block or warp only when no other can go on
TEMPERS = ("together", "mixed", "alone", "laggard")
# how soon copies land
HASTE = (0.3, 0.0, 1.0)
# seeds after which all combinations were drawn
ORDERS = len(TEMPERS) * len(HASTE)


class Scheduler:
    """Of the threads that run together.

    Attributes:
        haste: how soon copies land, from 0 (when nothing else can go on) to 1 (at once).
    """

    def __init__(self, threads: Threads, seed: int, generator: np.random.Generator) -> None:
        self.threads, self.generator = threads, generator
        self.temper = TEMPERS[seed % len(TEMPERS)]
        self.haste = HASTE[seed // len(TEMPERS) % len(HASTE)]
        unit = threads.block if len(threads.running) > 1 and seed // 2 % 2 else threads.warp
        self.slow = unit == generator.integers(0, unit[-1] + 1)

    def landing(self) -> float:
        """The chance of each copy to land now."""
        return min(self.haste, 0.99)

    def choose(self) -> tuple[Array, int]:
        """A set of threads, some of which can go on, as whole warps; and a number of steps."""
        ready = self.threads.status == READY
        draw = self.generator.random
        if self.temper == "laggard":
            quick = ready & ~self.slow
            return (~self.slow if quick.any() else self.slow), int(self.generator.integers(1, 50))
        if self.temper == "alone" or (self.temper == "mixed" and draw() < 0.3):
            warp = self.generator.choice(np.unique(self.threads.warp[ready]))
            return self.threads.warp == warp, 1 << 30 if self.temper == "alone" else int(self.generator.integers(1, 20))
        if self.temper == "mixed" and draw() < 0.6:
            chosen = self.generator.random(int(self.threads.warp[-1]) + 1) < 0.5
            group = chosen[self.threads.warp]
            if (group & ready).any():
                return group, int(self.generator.integers(1, 20))
        if draw() < 0.1:
            block = self.generator.choice(np.unique(self.threads.block[ready]))
            return self.threads.block == block, int(self.generator.integers(1, 30))
        return np.ones(self.threads.count, bool), int(self.generator.integers(1, 100))
