"""Metrics at the points where a comparison decides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fused_po import losses
from tests.losses.cases import make_batch


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge"])
def test_answers_that_are_worth_the_same_are_no_win(name):
    """As in TRL: before the first step, where the policy is the reference, the accuracy is 0."""
    loss = losses.create(name)
    stats, batch, _ = make_batch(loss, [2, 3, 3, 4])
    same = replace(batch, per_sequence={"ref_logp": batch.sum_per_sequence(stats.logp)})
    metrics = loss.metrics(stats, same)
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0


@pytest.mark.parametrize("lengths", [[2, 4], [2, 0, 4]])
def test_shares_of_clipped_tokens_are_of_each_sequence(lengths):
    """The least share below the range and the largest above it, of sequences of 2 and 4 tokens."""
    loss = losses.create("dapo", epsilon=0.2)
    stats, batch, _ = make_batch(loss, lengths)
    advantage = batch.per_token["advantage"].new_tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    # log-ratios: of the first sequence one above, of the second two below and one above
    drift = advantage.new_tensor([0.5, 0.0, -0.5, -0.5, 0.5, 0.0])
    given = {**batch.per_token, "advantage": advantage, "old_logp": stats.logp - drift}
    metrics = loss.metrics(stats, replace(batch, per_token=given))
    found = {name: float(metrics[f"clip_ratio/{name}"]) for name in ("low_min", "low_mean", "high_max", "high_mean")}
    assert found == pytest.approx({"low_min": 0.0, "low_mean": 2 / 6, "high_max": 0.5, "high_mean": 2 / 6})
