"""The cases that ``make test`` runs of a product: any two values meet, and the rest is left to the nightly run."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

from tests.pairwise import cover, pairwise

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("sizes", [(20, 4, 13), (7, 3, 2, 2), (2,) * 9, (5, 4), (6,), (1, 1, 1)])
def test_any_two_values_meet_in_few_cases(sizes):
    every = list(product(*map(range, sizes)))
    chosen = [every[number] for number in cover(every)]
    for a, b in combinations(range(len(sizes)), 2):
        assert {(case[a], case[b]) for case in chosen} == set(product(range(sizes[a]), range(sizes[b])))
    largest = sorted(sizes)[-2:]
    if len(sizes) > 1:
        assert largest[0] * largest[1] <= len(chosen) <= 1.5 * largest[0] * largest[1] + 4
    assert cover(every) == cover(every)


def test_pairs_that_no_case_has_are_not_missed():
    """Of a product with holes: the pairs of the cases that there are."""
    assert sorted(cover([("a", 1, "x"), ("a", 2, "x"), ("b", 2, "y"), ("b", 2, "y")])) == [0, 1, 2]


def test_names_and_values():
    cases = pairwise(letter=["a", "b"], flag=[False, True], number=[[1], [2], [3]])
    assert len(cases) == 6 and all(list(case) == ["letter", "flag", "number"] for case in cases)


def test_what_is_left_out_is_marked(pytester):
    """By the marks alone: a test that is elsewhere already takes no part, and one without the mark stays whole."""
    root = Path(__file__).parents[1]
    pytester.makeconftest(
        f"import sys\nsys.path.insert(0, {str(root)!r})\n"
        "import pytest\nfrom tests.pairwise import mark_the_rest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items):\n    mark_the_rest(items)\n"
    )
    pytester.makepyfile(
        "import pytest\n"
        "dear = pytest.param(3, marks=pytest.mark.large)\n"
        "@pytest.mark.pairwise\n"
        "@pytest.mark.parametrize('a', [1, 2, dear])\n"
        "@pytest.mark.parametrize('b', [{}, []])\n"
        "@pytest.mark.parametrize('c', ['x', 'y'])\n"
        "def test_thinned(a, b, c): pass\n"
        "@pytest.mark.parametrize('a', [1, 2])\n"
        "@pytest.mark.parametrize('b', [1, 2])\n"
        "@pytest.mark.parametrize('c', [1, 2])\n"
        "def test_whole(a, b, c): pass\n"
        "@pytest.mark.pairwise(a=1)\n"
        "@pytest.mark.parametrize('a', [1, 2])\n"
        "@pytest.mark.parametrize('b', [1, 2])\n"
        "@pytest.mark.parametrize('c', [1, 2])\n"
        "@pytest.mark.parametrize('d', [1, 2])\n"
        "def test_whole_for_one(a, b, c, d): pass\n"
        "@pytest.mark.pairwise\n"
        "def test_without_parameters(): pass\n"
    )

    def selected(expression: str) -> int:
        found = pytester.runpytest_inprocess("-m", expression, "-p", "no:cacheprovider")
        return found.parseoutcomes()["passed"]

    assert selected("not large and not nightly") == 4 + 8 + (8 + 5) + 1
    assert selected("nightly") == 4 + 3
    assert selected("large") == 4
