"""What rounding of the log-probs does to a loss, by which ``fused-po train --compare`` judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_po.losses.contract import total
from fused_po.ops.batches import Layout, call_batch, masked_stats
from fused_po.ops.plain import rounding
from fused_po.ops.planning import static_plan
from fused_po.stats import Stats
from tests.losses.cases import create
from tests.ops.problems import Problem

ULP = torch.finfo(torch.float32).eps


def value(problem: Problem, stats: Stats) -> torch.Tensor:
    """The loss of given statistics."""
    layout = Layout.of(problem.labels, static_plan(problem.labels, packed=False))
    batch = call_batch(layout, problem.side_inputs, None, None, torch.float64)
    flat = Stats(**{name: field.reshape(-1) for name, field in stats.present().items()})
    return total(problem.loss(masked_stats(flat, layout.mask), batch))


@pytest.mark.parametrize("case", ["sigmoid", "ipo", "kto", "grpo", "orpo", "dapo-all", "rloo", "sigmoid-forward"])
def test_no_rounding_moves_the_value_further(case):
    problem = Problem(create(case))
    stats = Stats(**{name: field.detach() for name, field in problem.stats().present().items()})
    most, relative = rounding(stats, problem.labels, problem.loss, **problem.side_inputs)
    assert 0 < most < 1e-4 and 0 <= relative < 1e-4
    start = value(problem, stats)
    for _ in range(20):
        noise = 1 + ULP * (2 * torch.rand_like(stats.logp) - 1)
        moved = value(problem, replace(stats, logp=stats.logp * noise))
        assert (moved - start).abs() <= most * 1.001


def test_a_ratio_of_a_whole_sequence_is_known_worse_than_one_of_a_token():
    sizes = {}
    for case in ("gpg", "topr"):
        problem = Problem(create(case), masked=0.0, length=200)
        stats = Stats(**{name: field.detach() for name, field in problem.stats().present().items()})
        sizes[case] = rounding(stats, problem.labels, problem.loss, **problem.side_inputs)
    assert sizes["gpg"][1] == 0.0
    assert sizes["topr"][1] > 10 * ULP
