"""A split that would do nothing is refused, and the message says what to change."""

from __future__ import annotations

import pytest
import torch

from fused_po import Split, linear_loss, losses, splits, stats_loss, token_stats
from tests.ops.problems import H, V


class Plain(losses.Loss):
    """DPO without a reference, written without a word on sides."""

    name = "plain"
    horizon = "pair"
    needs = frozenset({"logp"})

    def __call__(self, stats, batch):
        chosen, rejected = batch.halves(batch.sum_per_sequence(stats.logp))
        return {"margin": -batch.mean_pairs(torch.nn.functional.logsigmoid(chosen - rejected))}


class Sided(Plain):
    def role(self, batch):
        return torch.where(batch.chosen, 1.0, -1.0)


class Named(Sided):
    def __call__(self, stats, batch):
        return {"preference": super().__call__(stats, batch)["margin"]}


class WithNll(Named):
    def __call__(self, stats, batch):
        return super().__call__(stats, batch) | {"nll": -batch.mean_tokens(stats.logp)}


def positive_half(loss, **options):
    """dL/dhidden of the rejected half."""
    labels = torch.tensor([[1, 2], [3, 0]])
    hidden, weight = torch.randn(2, 2, H, dtype=torch.float64, requires_grad=True), torch.randn(V, H).double()
    linear_loss(hidden, weight, labels, loss, **options).loss.backward()
    return hidden.grad[1]


def test_a_split_does_something_or_is_refused():
    for loss in (Plain(), losses.create("sft")):
        with pytest.raises(ValueError, match=r"a split does nothing to loss .* defines role\(batch\)"):
            positive_half(loss, split=splits.positive_only())
        with pytest.raises(ValueError, match=r"split_gradients does nothing to loss .* defines role\(batch\)"):
            positive_half(loss, split_gradients=True)
    with pytest.raises(ValueError, match=r"none of its terms \(margin\) .* name the term policy or preference"):
        positive_half(Sided(), split=splits.positive_only())
    with pytest.raises(ValueError, match=r"terms without sides \(nll\), so its has_unsided_terms must be True"):
        positive_half(WithNll(), split=splits.positive_only())
    assert (positive_half(Named()) != 0).any()
    assert (positive_half(Named(), split=splits.positive_only()) == 0).all()


def test_a_split_on_statistics_is_checked_alike():
    labels, logits = torch.tensor([[1], [2]]), torch.randn(2, 1, 5)
    with pytest.raises(ValueError, match="a split does nothing to loss 'plain'"):
        stats_loss(token_stats(logits, labels), labels, Plain(), split=splits.positive_only())
    with pytest.raises(ValueError, match="split must be a fused_po.Split"):
        stats_loss(token_stats(logits, labels), labels, Named(), split=0.5)


def test_a_schedule_is_told_how_far_the_training_is():
    split = splits.controlled_dpo()
    with pytest.raises(ValueError, match=r"give split\.at\(step / steps\) in each step"):
        positive_half(Named(), split=split)
    assert (positive_half(Named(), split=split.at(0.0)) == 0).all()
    assert (positive_half(Named(), split=split.at(0.5)) != 0).any()
    # numbers need no progress
    assert Split(positive=0.5).weights == (0.5, 1.0)
