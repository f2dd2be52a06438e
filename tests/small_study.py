"""A study of seconds, for the tests of it."""

from __future__ import annotations

from functools import lru_cache

from fused_po.study.run import Results, run_seed, total_updates
from fused_po.study.settings import QUICK, Settings

SMALL = Settings(**{**QUICK, "sft_steps": 100, "steps": 8, "pairs": 8, "samples": 16})


@lru_cache(1)
def small_results() -> Results:
    """One seed of it, which nobody changes."""
    counted: list[int] = []
    found = run_seed(0, SMALL, counted.append)
    assert sum(counted) == total_updates(SMALL)
    return found
