"""A short run of the fuzzer on extreme numbers; the long ones are ``python -m tests.fuzz --extreme``."""

from __future__ import annotations

import pytest

from fused_po import losses
from fused_po.losses import grpo, pairwise, terms
from tests.fuzz.extreme import FORMULAS, extreme_failures

EACH = 50


def wrong(seeds: range, *names: str) -> dict[str, list[str]]:
    return {words: found for words, found in (extreme_failures(seed, names) for seed in seeds) if found}


def test_every_loss_has_a_formula():
    assert FORMULAS.keys() == set(losses.names())


@pytest.mark.parametrize("first", range(0, 500, EACH))
def test_extreme_numbers(first):
    assert wrong(range(first, first + EACH)) == {}


@pytest.mark.parametrize("name", losses.names())
def test_every_loss(name):
    assert wrong(range(10), name) == {}


def test_an_exponential_that_cancels_is_found(monkeypatch):
    def product(logp, reference, old, estimator):
        kl = terms.kl_penalty(logp, reference, estimator)
        return kl * terms.bounded(terms.difference(logp, old), 80.0).exp()

    monkeypatch.setattr(grpo, "weighted_kl", product)
    assert wrong(range(60), "dapo")


def test_another_clamp_is_found(monkeypatch):
    monkeypatch.setattr(pairwise, "bounded_expm1", lambda x, limit=60.0: terms.bounded_expm1(x, 60.0))
    assert wrong(range(100), "sigmoid")


def test_a_slope_that_is_lost_is_found(monkeypatch):
    """A log-ratio that is constant beyond 1e3 already."""
    monkeypatch.setattr(pairwise, "difference", lambda a, b: terms.difference(a, b, 1e3))
    assert wrong(range(60), "sppo_hard")


def test_a_nan_is_found(monkeypatch):
    """0 times the infinite loss of a token without probability."""
    monkeypatch.setattr(losses.sft, "weighted", lambda values, weight: values * weight)
    assert any("NaN" in line for lines in wrong(range(200), "sft").values() for line in lines)
