"""Mistakes in a loss of one's own are named where they show, and not computed with."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fused_po import Split, linear_loss, losses, splits, stats_loss, token_stats
from fused_po.losses import registry
from fused_po.ops.checks import TRACES
from tests.ops.problems import CountGemms, H, V, relative_error


@dataclass(frozen=True)
class Pairs(losses.Loss):
    """DPO without a reference, written without a base."""

    name = "pairs"
    horizon = "pair"
    needs = frozenset({"logp"})

    def scores(self, stats, batch):
        return batch.sum_per_sequence(stats.logp)

    def __call__(self, stats, batch):
        chosen, rejected = batch.halves(self.scores(stats, batch))
        return {"preference": -batch.mean_pairs(torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)))}

    def role(self, batch):
        return batch.chosen * 2.0 - 1.0


class WrongPattern(Pairs):
    """Divides by lengths, and says that it does not."""

    def scores(self, stats, batch):
        return batch.mean_per_sequence(stats.logp)

    def pattern(self, batch):
        return self.role(batch)


class RightPattern(WrongPattern):
    def pattern(self, batch):
        return self.role(batch).double() / batch.token_lengths


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Losses that a test registers are gone afterwards: others know them all."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def leaves(batch=2, length=40, answered=25):
    """One or more pairs, the rejected answers shorter than the chosen."""
    torch.manual_seed(0)
    labels = torch.randint(0, V, (batch, length))
    labels[batch // 2 :, answered:] = -100
    shapes = (batch, length, H), (V, H)
    hidden, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return hidden, weight, labels


def run(loss, **options):
    hidden, weight, labels = leaves()
    found = linear_loss(hidden, weight, labels, loss, **options)
    return torch.autograd.grad(found.loss, (hidden, weight))


# a budget that holds the pair, one that does not, and two pairs at once
@pytest.mark.parametrize("scratch, batch", [(1 << 24, 2), (0, 2), (1 << 24, 4)])
def test_a_wrong_pattern_is_an_error_in_short_calls_too(scratch, batch):
    hidden, weight, labels = leaves(batch)
    with pytest.raises(ValueError, match=r"not one number times it: leave pattern out.*batch\.token_lengths"):
        linear_loss(hidden, weight, labels, WrongPattern(), scratch_bytes=scratch)
    # and again: what was wrong once is looked at once more
    with pytest.raises(ValueError, match="leave pattern out"):
        linear_loss(hidden, weight, labels, WrongPattern(), scratch_bytes=scratch)
    with pytest.raises(ValueError, match="leave pattern out"):
        stats_loss(token_stats(hidden @ weight.t(), labels), labels, WrongPattern())


def test_a_pattern_that_is_wrong_for_long_calls_alone():
    """Answers of one length do not tell it; the horizon that does not fit is looked at in every call."""
    hidden, weight, labels = leaves(answered=40)
    linear_loss(hidden, weight, labels, WrongPattern(), scratch_bytes=1 << 24)
    # as many tokens as before, shared out differently
    hidden = torch.randn(2, 60, H, dtype=torch.float64, requires_grad=True)
    shorter = torch.full((2, 60), -100)
    shorter[0], shorter[1, :20] = 1, 2
    with pytest.raises(ValueError, match="leave pattern out"):
        linear_loss(hidden, weight, shorter, WrongPattern(), scratch_bytes=0)


def test_where_nobody_looks_a_wrong_pattern_makes_the_gradient_nan(monkeypatch):
    """As on a GPU, which is not waited for."""
    for module in ("loss_pass", "declared"):
        monkeypatch.setattr(f"fused_po.ops.{module}.looks_at", lambda tensor: False)
    assert all(grad.isnan().all() for grad in run(WrongPattern(), scratch_bytes=0))
    # one that fits does not take it
    want = run(WrongPattern(), scratch_bytes=1 << 24)
    assert all(grad.isfinite().all() for grad in want)
    for mine, theirs in zip(run(RightPattern(), scratch_bytes=0), want, strict=True):
        assert relative_error(mine, theirs) < 1e-11


@pytest.mark.skipif(not TRACES, reason="linear_loss does not trace before torch 2.13")
def test_a_pattern_in_a_trace():
    # few tiles: each is traced for itself
    hidden, weight, labels = leaves(length=8, answered=5)
    for loss in (RightPattern(), WrongPattern()):
        torch._dynamo.reset()

        def value(hidden, weight, loss=loss):
            return linear_loss(hidden, weight, labels, loss, scratch_bytes=0).loss

        compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
        if isinstance(loss, RightPattern):
            want = torch.autograd.grad(value(hidden, weight), (hidden, weight))
            for mine, theirs in zip(got, want, strict=True):
                assert relative_error(mine, theirs) < 1e-11
        else:
            assert all(grad.isnan().all() for grad in got)


def test_a_right_pattern_is_used():
    hidden, weight, labels = leaves()
    with CountGemms(labels) as count:
        linear_loss(hidden, weight, labels, RightPattern(), scratch_bytes=0).loss.backward()
    assert round(count.gemms, 3) == 3
    with pytest.raises(ValueError, match=r"pattern of loss 'pairs' must be \(N,\)"):
        run(type("Flat", (Pairs,), {"pattern": lambda self, batch: torch.ones(2)})())


@pytest.mark.parametrize(
    "returned, message",
    [
        (None, "must return a dict of named terms, as .'preference': value.: got None"),
        ({}, r"must return a dict of named terms.*: got \{\}"),
        (torch.zeros(()), r"dict of named terms.*: got a tensor of shape \(\)"),
        (0.5, "dict of named terms.*: got 0.5"),
        ({"preference": 0.5}, r"must be a tensor of shape \(\).*: got 0.5 for 'preference'"),
        ({"preference": torch.zeros(3)}, r"must be a tensor of shape \(\).*: got a tensor of shape \(3,\)"),
        ({"preference": torch.zeros(1)}, r"must be a tensor of shape \(\).*: got a tensor of shape \(1,\)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"split": splits.positive_only()}])
def test_what_a_loss_returns(returned, message, options):
    loss = type("Returns", (Pairs,), {"__call__": lambda self, stats, batch: returned})()
    with pytest.raises(ValueError, match=message):
        run(loss, **options)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        hidden, weight, labels = leaves()
        linear_loss(hidden, weight, labels, loss)


@pytest.mark.parametrize(
    "declared, message",
    [
        ({"horizon": "pairs"}, r"no known horizon \(did you mean pair\?\): wanted one of token, .*got 'pairs'"),
        ({"horizon": None}, "no known horizon"),
        ({"needs": {"logp", "logprob"}}, r"needs .* names unknown logprob \(did you mean logp\?\)"),
        ({"needs": ["logp"]}, r"needs .* must be a set of names, as frozenset.*got \['logp'\]"),
        ({"needs": "logp"}, "needs .* must be a set of names, as frozenset.*got 'logp'"),
        ({"needs": {"ref_logp"}, "differentiates": ("logp",)}, "differentiates logp, so add logp to needs"),
        ({"reports": "entropy"}, "reports .* must be a tuple of names"),
        ({"differentiates": ("max_logp",)}, "differentiates .* names unknown max_logp"),
    ],
)
def test_declarations_are_checked_where_a_loss_is_registered(declared, message):
    with pytest.raises(ValueError, match=message):
        losses.register("wrong")(type("Wrong", (Pairs,), declared))
    assert "wrong" not in losses.names()
    # a property is known once there is an instance
    properties = {name: property(lambda self, value=value: value) for name, value in declared.items()}
    losses.register("late")(type("Late", (Pairs,), properties))
    for name in ("late", ["late", "hinge"]):
        with pytest.raises(ValueError, match=message):
            losses.create(name)


@pytest.mark.parametrize("declared", [{"horizon": "pairs"}, {"needs": ["logp"]}, {"needs": {"logp", "logprob"}}])
def test_declarations_of_a_loss_that_is_not_registered(declared):
    with pytest.raises(ValueError, match="no known horizon|must be a set of names|names unknown"):
        run(type("Wrong", (Pairs,), declared)())


@pytest.mark.parametrize("horizon", ["token", "sequence"])
@pytest.mark.parametrize("scratch", [0, 1 << 24])
def test_a_horizon_that_is_too_small(horizon, scratch):
    loss = type("Small", (Pairs,), {"horizon": horizon})()
    needed = {"token": "sequence", "sequence": "pair"}[horizon]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"its horizon is '{horizon}'.*set horizon = '{needed}'"):
            run(loss, scratch_bytes=scratch)


def reads(read):
    return type("Reads", (Pairs,), {"scores": read})()


@pytest.mark.parametrize(
    "read, message",
    [
        (lambda self, stats, batch: batch.sum_per_sequence(stats.logp - batch.token("ref_logp")), "add 'ref_logp'"),
        (lambda self, stats, batch: batch.sum_per_sequence(batch.token("ref_logp")), "add 'ref_logp' to needs"),
        (lambda self, stats, batch: batch.sequence("ref_logp").double(), "add 'ref_logp' to needs"),
        (lambda self, stats, batch: batch.spread(batch.sequence("advantage")), "add 'advantage' to needs"),
        (lambda self, stats, batch: batch.sum_per_sequence(stats.logp) - batch.scalar("kl"), "add 'kl' to needs"),
        (lambda self, stats, batch: batch.sum_per_sequence(stats.entropy), "add 'entropy' to needs"),
        (lambda self, stats, batch: batch.sum_per_sequence(stats.logp * stats.max_logp), "add 'max_logp' to needs"),
        (lambda self, stats, batch: batch.sequence("ref_logps") + 1, r"'ref_logps' \(did you mean ref_logp\?\)"),
    ],
)
def test_what_a_loss_reads_and_did_not_name(read, message):
    with pytest.raises(ValueError, match=message):
        run(reads(read))
    # the error of a loss for another reason stays as it is
    with pytest.raises(ZeroDivisionError):
        run(reads(lambda self, stats, batch: 1 / 0))


@pytest.mark.parametrize("method, options", [("role", {}), ("role", {"split_gradients": True}), ("weight", {})])
def test_one_number_per_token(method, options):
    values = {"role": lambda self, batch: torch.tensor([1.0, -1.0]), "weight": lambda self, c, batch: torch.ones(2)}
    loss = type("Short", (Pairs,), {method: values[method]})()
    with pytest.raises(ValueError, match=rf"{method} of loss 'pairs' must be \(N,\), one per loss token, here \(65,\)"):
        run(loss, **(options or {"split": Split(positive=0.5)}))


def test_weights_of_another_kind():
    with pytest.raises(ValueError, match=r"positive must be a number or a schedule.*: got \(1.0, 0.0\)"):
        Split(positive=(1.0, 0.0))
    with pytest.raises(ValueError, match="negative must be a number or a schedule"):
        Split(negative="0.5")
    with pytest.raises(ValueError, match="a schedule must return a number: got None"):
        Split(positive=lambda progress: None)
    with pytest.raises(ValueError, match="tertile_gains must be three numbers"):
        Split(tertile_gains=(1.0, 2.0))
    for preset in (splits.controlled_dpo, splits.controlled_ppo):
        with pytest.raises(ValueError, match="positive must be two numbers.*beginning and at the end: got 0.5"):
            preset(positive=0.5)
        with pytest.raises(ValueError, match="negative must be two numbers"):
            preset(negative=(1.0, 0.5, 0.0))
        with pytest.raises(ValueError, match="end must be a number: got 'a'"):
            preset(negative=(1.0, "a"))


@pytest.mark.parametrize(
    "name, warns", [("sigmoid", True), ("kto", True), ("ppo", True), ("gpg", True), ("topr", False)]
)
def test_a_mean_over_one_sample_is_said_to_do_nothing(name, warns, recwarn):
    loss = losses.create(name)
    splits.check_split(Split(reweight="none"), loss)
    said = [str(one.message) for one in recwarn]
    assert len(said) == warns and all("take population='batch'" in one for one in said)
    splits.check_split(splits.no_reweighting(), loss)
    splits.check_split(Split(reweight="none", population="running", running_mean=0.3), loss)
    assert len(recwarn) == warns
