"""A short run of the fuzzer; the long ones are ``python -m tests.fuzz``."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.fuzz.check import failures
from tests.fuzz.draw import NARROW, draw
from tests.interpreted import skip_unless_interpreted

EACH = 50


@pytest.mark.parametrize("first", range(0, 1000, EACH))
def test_the_reference(first):
    found = {seed: failures(draw(seed), "reference") for seed in range(first, first + EACH)}
    assert {seed: wrong for seed, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_the_interpreted_kernels(first):
    skip_unless_interpreted()
    found = {seed: failures(draw(seed, dtypes=NARROW), "triton") for seed in range(first, first + 10)}
    assert {seed: wrong for seed, wrong in found.items() if wrong} == {}


def test_a_gradient_that_is_wrong_is_found(monkeypatch):
    """One coefficient of one row in a thousand parts too large."""
    module = import_module("fused_po.ops.stats_loss")
    exact = module.coefficients

    def other(*arguments):
        value, triple = exact(*arguments)
        return value, triple._replace(logp=triple.logp * 1.001)

    monkeypatch.setattr(module, "coefficients", other)
    found = [failures(draw(seed, dtypes=(torch.float64,)), "reference") for seed in range(40)]
    assert any("gradient" in line for lines in found for line in lines)
