"""Shards of the vocabulary merge to the whole: columns are computed apart and put together."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_po.kernels import library
from fused_po.kernels.contract import Coefficients, Span, finish, merge
from fused_po.stats import STATISTICS
from fused_po.testing import CASES
from tests.kernels.test_rows import backends, interpreted_or_skip


@backends
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), min_size=0, max_size=3), seed=st.integers(0, 99))
def test_shards_of_the_vocabulary_merge_to_the_whole(backend, device, cuts, seed):
    interpreted_or_skip(backend, device)
    problem = CASES["everything"].make(torch.float32, device, seed)
    x = problem.x[:, :40].contiguous()
    x[0, :5] = -torch.inf
    labels = problem.labels % 40
    partials = library.row_stats(x, labels, problem.transform, Span(0, 40), STATISTICS, backend)
    whole, anchors = finish(partials, labels, 40, STATISTICS)
    bounds = [0, *sorted(set(cuts)), 40]
    shards, gradient = [], torch.empty_like(x)
    ones = Coefficients(*torch.ones(3, 5, device=device))
    for first, last in itertools.pairwise(bounds):
        shard = x[:, first:last].clone()
        span = Span(first, last)
        shards.append(library.row_stats(shard, labels, problem.transform, span, STATISTICS, backend))
        library.row_grad(shard, labels, problem.transform, span, anchors, ones, None, backend)
        gradient[:, first:last] = shard
    merged, _ = finish(merge(torch.stack(shards)), labels, 40, STATISTICS)
    for name, value in whole.present().items():
        torch.testing.assert_close(getattr(merged, name), value, rtol=2e-6, atol=2e-6)
    library.row_grad(x, labels, problem.transform, Span(0, 40), anchors, ones, None, backend)
    assert torch.equal(gradient, x)


# below 0 lies what a column beyond the shard must not count as
@pytest.mark.parametrize("least", [0, -5])
@backends
def test_ties_across_shards_belong_to_the_first_class(backend, device, least):
    interpreted_or_skip(backend, device)
    torch.manual_seed(0)
    x = torch.randint(least, least + 3, (64, 12), device=device).float()
    labels, transform = torch.arange(64, device=device) % 12, CASES["flat"].make(torch.float32).transform
    for cuts in ([], [1], [5], [3, 4, 9]):
        shards = [
            library.row_stats(x[:, first:last].clone(), labels, transform, Span(first, last), ("is_top1",), backend)
            for first, last in itertools.pairwise([0, *cuts, 12])
        ]
        stats, _ = finish(merge(torch.stack(shards)), labels, 12, ("is_top1",))
        assert torch.equal(stats.is_top1, x.argmax(1) == labels)


@backends
def test_a_target_of_another_shard_leaves_all_classes_to_minus_p(backend, device):
    interpreted_or_skip(backend, device)
    x = torch.randn(4, 40, device=device)
    labels = torch.tensor([3, 12, 55, 31], device=device)
    span, transform = Span(10, 50), CASES["flat"].make(torch.float32).transform
    out = torch.empty_like(x)
    library.row_softmax(x, labels, transform, span, ("logp",), out, backend)
    p = x.softmax(1)
    want = -p
    for row, column in ((1, 2), (3, 21)):
        # over the other classes the probabilities are those beside the target
        want[row, column] += 1.0
    torch.testing.assert_close(out, want, rtol=2e-5, atol=1e-6)
