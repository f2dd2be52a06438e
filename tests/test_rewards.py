"""Advantages of rewards as they come: whole numbers, and all alike."""

from __future__ import annotations

import math

import pytest
import torch

from fused_po.advantages import SCALES, gae, group_relative, leave_one_out, reinforce_plus_plus, whiten

NAN, F64 = math.nan, torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_rewards_of_whole_numbers(dtype):
    """Right or wrong, as 1 and 0: the same as in float32."""
    rewards = torch.tensor([1, 0, 1, 1, 0, 0]).to(dtype)
    tokens = rewards.reshape(2, 3)
    for function, values, options in (
        (group_relative, (rewards,), {"num_generations": 3}),
        (leave_one_out, (rewards,), {"groups": torch.tensor([0, 1, 0, 1, 0, 1])}),
        (reinforce_plus_plus, (tokens,), {}),
        (lambda r: gae(r, torch.zeros(2, 3))[0], (tokens,), {}),
    ):
        found = function(*values, **options)
        assert found.dtype == torch.float32
        assert torch.equal(found, function(*(tensor.float() for tensor in values), **options))


@pytest.mark.parametrize("value", [0.1, 0.7 * 1.1, 1e6 + 0.1, -1e-3, 1e300])
@pytest.mark.parametrize("count", [2, 3, 7, 8, 11])
def test_rewards_that_are_alike_are_worth_nothing(value, count):
    """Exactly: a mean that is rounded leaves 1e-13 / eps, which an optimizer scales up to a step."""
    rewards = torch.full((count,), value, dtype=F64)
    for scale in SCALES:
        assert (group_relative(rewards, num_generations=count, scale=scale) == 0).all()
    assert (leave_one_out(rewards, num_generations=count) == 0).all()
    assert (whiten(rewards) == 0).all()
    unscored = rewards.clone()
    unscored[0] = NAN
    assert (group_relative(unscored, num_generations=count) == 0).all()
    # other groups lie elsewhere
    both = torch.cat([rewards, torch.randn(count, dtype=F64)])
    assert (group_relative(both, num_generations=count)[:count] == 0).all()
