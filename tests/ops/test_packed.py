"""Packed calls: which sequence a token belongs to is never guessed."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats, make_plan, stats_loss

H, V = 4, 7


def problem(lengths: list[int], seed: int = 0):
    torch.manual_seed(seed)
    count = sum(lengths)
    hidden, weight = torch.randn(count, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return hidden, weight, torch.randint(0, V, (count,)), bounds


@pytest.mark.parametrize("name", ["gpg", "dapo", "rloo"])
def test_as_many_tokens_as_sequences(name):
    """A (B,) side input there could be one per token: the call asks, and takes a shape for an answer."""
    hidden, weight, labels, bounds = problem([2, 0])
    loss, advantage = losses.create(name), torch.tensor([1.0, -2.0], dtype=torch.float64)
    call = {"cu_seqlens": bounds}
    with pytest.raises(ValueError, match=r"advantage may be one per sequence or one per token, 2 of each.*\(2, 1\)"):
        linear_loss(hidden, weight, labels, loss, advantage=advantage, **call)
    of_sequences = linear_loss(hidden, weight, labels, loss, advantage=advantage[:, None], **call)
    of_tokens = linear_loss(hidden, weight, labels, loss, advantage=advantage[None], **call)
    padded = {"hidden": torch.stack([hidden, hidden]), "labels": torch.stack([labels, torch.full_like(labels, -100)])}
    want = linear_loss(weight=weight, loss=loss, advantage=advantage, **padded)
    torch.testing.assert_close(of_sequences.loss, want.loss)
    want = linear_loss(weight=weight, loss=loss, advantage=torch.stack([advantage, advantage]), **padded)
    torch.testing.assert_close(of_tokens.loss, want.loss)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 1, 1, 1, 1]])
def test_sequences_of_one_token_need_no_answer(lengths):
    hidden, weight, labels, bounds = problem(lengths)
    values = torch.randn(len(lengths), dtype=torch.float64)
    loss = losses.create("dapo", beta=0.1)
    side = {"advantage": values, "ref_logp": values - 1.0}
    found = linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, **side)
    said = {name: value[None] for name, value in side.items()}
    torch.testing.assert_close(found.loss, linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, **said).loss)


def test_the_shape_may_always_say_it():
    hidden, weight, labels, bounds = problem([3, 1, 2, 2])
    values = torch.randn(4, dtype=torch.float64)
    loss = losses.create("sigmoid")
    want = linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, ref_logp=values).loss
    found = linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, ref_logp=values[:, None]).loss
    assert torch.equal(found, want)
    with pytest.raises(ValueError, match=r"ref_logp must have shape \(4,\) or \(8,\)"):
        linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, ref_logp=values[None])


def test_temperatures_of_as_many_tokens_as_sequences():
    hidden, weight, labels, bounds = problem([1, 1, 2, 0])
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    loss = losses.create("sft")
    with pytest.raises(ValueError, match="temperature may be one per sequence or one per token, 4 of each"):
        linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, temperature=temperature)
    with pytest.raises(ValueError, match="temperature may be one per sequence or one per token, 4 of each"):
        plan = make_plan(labels, cu_seqlens=bounds)
        linear_token_stats(hidden, weight, labels, plan=plan, temperature=temperature)
    logits = hidden @ weight.t()
    for given, each in ((temperature[None], temperature), (temperature[:, None], temperature[[0, 1, 2, 2]])):
        found = linear_loss(hidden, weight, labels, loss, cu_seqlens=bounds, temperature=given).stats.logp
        want = (logits / each[:, None]).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("holes", [False, True])
def test_a_plan_of_other_boundaries_is_refused(holes):
    hidden, weight, labels, _ = problem([4, 6])
    if holes:
        labels[5] = -100
    bounds, other = torch.tensor([0, 4, 10]), torch.tensor([0, 6, 10])
    loss, reference = losses.create("sigmoid"), torch.zeros(2, dtype=torch.float64)
    plan = make_plan(labels, cu_seqlens=bounds)
    linear_loss(hidden, weight, labels, loss, plan=plan, cu_seqlens=bounds, ref_logp=reference)
    with pytest.raises(ValueError, match="the plan is of other sequences than cu_seqlens"):
        linear_loss(hidden, weight, labels, loss, plan=plan, cu_seqlens=other, ref_logp=reference)
    stats = linear_token_stats(hidden, weight, labels)
    with pytest.raises(ValueError, match="the plan is of other sequences than cu_seqlens"):
        stats_loss(stats, labels, loss, plan=plan, cu_seqlens=other, ref_logp=reference)
    # one sequence, with the labels at the boundary ignored: nothing in the plan differs
    with pytest.raises(ValueError, match="the plan is of 2 sequences"):
        linear_loss(hidden, weight, labels, loss, plan=plan, cu_seqlens=bounds[::2], ref_logp=reference)
