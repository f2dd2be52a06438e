"""Advantages and importance weights on a GPU: the numbers of a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fused_po import advantages

pytestmark = pytest.mark.gpu

FUNCTIONS = {
    "gae": lambda a, b, mask, **cu: advantages.gae(a, b, mask, gamma=0.9, lam=0.8, **cu)[0],
    "reinforce_plus_plus": lambda a, b, mask, **cu: advantages.reinforce_plus_plus(a, mask, gamma=0.9, **cu),
    "whiten": lambda a, b, mask, **cu: advantages.whiten(a, mask),
    **{
        mode: partial(advantages.rollout_importance_weight, mode=mode, clip_max=1.5)
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tokens(name, packed):
    torch.manual_seed(0)
    a, b, mask = torch.randn(4, 11), torch.randn(4, 11), torch.rand(4, 11) < 0.7
    options = {}
    if packed:
        a, b, mask = a.ravel(), b.ravel(), mask.ravel()
        options["cu_seqlens"] = torch.tensor([0, 11, 11, 30, 44])
    want = FUNCTIONS[name](a, b, mask, **options)
    got = FUNCTIONS[name](a.cuda(), b.cuda(), mask.cuda(), **{key: t.cuda() for key, t in options.items()})
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups(scale):
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0])
    for function in (partial(advantages.group_relative, scale=scale), advantages.leave_one_out):
        got = function(rewards.cuda(), num_generations=3)
        torch.testing.assert_close(got.cpu(), function(rewards, num_generations=3))
