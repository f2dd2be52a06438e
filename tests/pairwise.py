"""Few cases of a product of parameters in which any two values of different parameters meet."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

__all__ = ["cover", "mark_the_rest", "pairwise"]

# what make test leaves out already
ELSEWHERE = ("gpu", "large", "nightly")


def cover(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """Positions of few cases, in the order in which they were chosen, with every pair of values of the whole list.

    The case that brings most pairs comes first, of several the one that stands first: the same list gives the same
    cases.
    """
    pairs = [{(a, case[a], b, case[b]) for a, b in combinations(range(len(case)), 2)} for case in cases]
    missing = set().union(*pairs)
    # what a case brings only falls, so a number that is out of date is a bound
    heap = [(-len(found), number) for number, found in enumerate(pairs)]
    heapq.heapify(heap)
    chosen = []
    while missing:
        _, number = heapq.heappop(heap)
        now = (-len(pairs[number] & missing), number)
        if heap and now > heap[0]:
            heapq.heappush(heap, now)
            continue
        missing -= pairs[number]
        chosen.append(number)
    return chosen


def pairwise(**factors: list[Any]) -> list[dict[str, Any]]:
    """The cover of a product of named factors."""
    every = list(product(*factors.values()))
    indices = list(product(*(range(len(values)) for values in factors.values())))
    return [dict(zip(factors, every[number], strict=True)) for number in cover(indices)]


def mark_the_rest(items: list[pytest.Item]) -> None:
    """Of each test marked ``pairwise``, mark as ``nightly`` the cases that the cover of its parameters leaves out.

    ``pairwise(backend="reference")`` keeps all cases with that value, and covers the others by themselves.
    """
    groups: dict[str, list[pytest.Function]] = {}
    for item in items:
        mark = item.get_closest_marker("pairwise")
        if mark is None or not hasattr(item, "callspec") or any(map(item.get_closest_marker, ELSEWHERE)):
            continue
        assert isinstance(item, pytest.Function)
        kept = mark.kwargs.items()
        if not kept or any(item.callspec.params[name] != value for name, value in kept):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in groups.values():
        kept = cover([[_key(value) for value in item.callspec.params.values()] for item in group])
        for number in set(range(len(group))) - set(kept):
            group[number].add_marker("nightly")


def _key(value: Any) -> Hashable:
    """Equal for the same value of a parameter, which every case holds as the same object."""
    return (type(value), value) if isinstance(value, (str, int, float)) else id(value)
