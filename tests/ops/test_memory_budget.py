"""Scratch is a budget, not a function of the length."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses
from fused_po.diagnostics.memory import peak_memory
from fused_po.ops import linear_loss, linear_token_stats

H, V = 48, 6000
MIB = 1 << 20
# blocks of the reference kernels, and numbers per token
BESIDE = 5 * MIB


def scratch_of(case: str, length: int, budget: int) -> int:
    """Peak above inputs and gradients, in bytes; all logits of 2 x 1000 tokens are 46 MiB."""
    torch.manual_seed(0)
    sequences = 4 if case == "recompute" else 2
    hidden = torch.randn(sequences, 2 * length // sequences, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=case != "frozen")
    labels = torch.randint(0, V, hidden.shape[:-1])

    def call() -> object:
        if case == "statistics":
            linear_token_stats(hidden, weight, labels, scratch_bytes=budget).logp.sum().backward()
        else:
            loss = losses.create("dapo", entropy_coef=0.1) if case == "entropy" else losses.create("sigmoid")
            inputs = {"advantage": torch.ones(sequences)} if case == "entropy" else {"ref_logp": torch.zeros(sequences)}
            linear_loss(hidden, weight, labels, loss, scratch_bytes=budget, **inputs).loss.backward()
        return None

    gradients = hidden.nbytes + (weight.nbytes if weight.requires_grad else 0)
    return peak_memory(call, "cpu") - gradients


@pytest.mark.parametrize("case", ["deferred", "recompute", "frozen", "entropy", "statistics"])
def test_scratch_stays_within_its_budget_at_any_length(case):
    budget = 8 * MIB
    short, long = scratch_of(case, 1000, budget), scratch_of(case, 4000, budget)
    assert short <= budget + BESIDE
    # per-token numbers are all that grows: 40 of them, in float64
    assert long <= short + 3000 * 2 * 40 * 8


def test_more_budget_is_used():
    assert scratch_of("recompute", 1000, 32 * MIB) > 24 * MIB
