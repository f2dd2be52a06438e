"""Positive learning, negative learning and reweighting: as operations on coefficients, and as gradients of parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_po import Split, linear_loss, linear_token_stats, losses, splits, stats_loss, token_stats
from fused_po.ops.coefficients import coefficients, sided_coefficients
from fused_po.splits import Linear, tertiles
from tests.losses.cases import CASES, create, make_batch
from tests.ops.problems import CountGemms, EntropyPairs, H, Problem, V, relative_error, words

LENGTHS = [5, 1, 3, 2, 4, 6]
ROW = 8 * V + 32 * H
HEAD_FROZEN = frozenset({"weight", "bias"})
cases = pytest.mark.parametrize("case", CASES)


def sliced(case: str, split: Split | None):
    """dL/dlogp under a split."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS)
    return coefficients(loss, stats, batch, split)


@cases
def test_the_identity_changes_nothing(case):
    value, triple = sliced(case, None)
    same, split = sliced(case, Split())
    torch.testing.assert_close(same, value, rtol=1e-12, atol=1e-15)
    for got, want in zip(split, triple, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-18)


@cases
@pytest.mark.parametrize("by", ["role", "direction"])
def test_the_parts_sum_to_the_whole(case, by):
    """What has no side is in both parts, and left over when both are taken away."""
    _, whole = sliced(case, None)
    _, positive = sliced(case, Split(negative=0.0, by=by))
    _, negative = sliced(case, Split(positive=0.0, by=by))
    _, rest = sliced(case, Split(positive=0.0, negative=0.0, by=by))
    torch.testing.assert_close(positive.logp + negative.logp - rest.logp, whole.logp, rtol=1e-12, atol=1e-16)
    if whole.entropy is not None:
        assert torch.equal(rest.entropy, whole.entropy)


def test_sides_of_a_pair_and_of_an_advantage():
    _, c = sliced("sigmoid", Split(negative=0.0))
    chosen = make_batch(create("sigmoid"), LENGTHS)[1].chosen
    assert (c.logp[chosen] < 0).all() and (c.logp[~chosen] == 0).all()
    loss = create("dapo")
    stats, batch, _ = make_batch(loss, LENGTHS)
    c = coefficients(loss, stats, batch, Split(positive=0.0))[1].logp
    assert (c >= 0).all() and (c > 0).any() and (c[batch.token("advantage") > 0] == 0).all()


def test_terms_without_a_side_stay():
    loss, plain = losses.create("cpo", cpo_alpha=1.0), losses.create("cpo", cpo_alpha=0.0)
    stats, batch, _ = make_batch(loss, LENGTHS)
    nll = coefficients(loss, stats, batch)[1].logp - coefficients(plain, stats, batch)[1].logp
    left = coefficients(loss, stats, batch, Split(positive=0.0, negative=0.0))[1].logp
    torch.testing.assert_close(left, nll, rtol=1e-12, atol=1e-16)


def test_the_paper_s_weights():
    """sigmoid(-beta h) for DPO, |A| for PPO."""
    loss = losses.create("sigmoid", beta=0.3)
    stats, batch, _ = make_batch(loss, LENGTHS)
    u, v = batch.halves(batch.sum_per_sequence(stats.logp) - batch.sequence("ref_logp"))
    want = batch.spread(torch.sigmoid(-0.3 * (u - v)).repeat(2))
    torch.testing.assert_close(loss.weight(sided_coefficients(loss, stats, batch), batch), want)
    loss = losses.create("ppo")
    stats, batch, _ = make_batch(loss, LENGTHS)
    weight = loss.weight(sided_coefficients(loss, stats, batch), batch)
    assert torch.equal(weight, batch.token("advantage").abs())


def test_sppo_beyond_its_target_is_negative_learning_by_direction_only():
    loss = losses.create("sppo_hard", beta=10.0)
    stats, batch, _ = make_batch(loss, LENGTHS)
    by_role = coefficients(loss, stats, batch, Split(negative=0.0))[1].logp
    by_direction = coefficients(loss, stats, batch, Split(negative=0.0, by="direction"))[1].logp
    lowered = batch.chosen & (by_role > 0)
    assert lowered.any() and (by_direction[lowered] == 0).all()
    assert (by_direction <= 0).all()


def dpo_weights():
    loss = losses.create("sigmoid", beta=0.5)
    lengths = [5, 1, 3, 2, 4, 6, 2, 2, 3, 1, 4, 2]
    stats, batch, _ = make_batch(loss, lengths)
    weight = batch.halves(batch.mean_per_sequence(loss.weight(sided_coefficients(loss, stats, batch), batch)))[0]

    def found(split: Split) -> torch.Tensor:
        """f(w) of each pair, from its chosen answer."""
        c = coefficients(loss, stats, batch, split)[1].logp
        return batch.halves(batch.mean_per_sequence(-c))[0] * batch.num_pairs / 0.5

    return weight, found


def test_reweighting():
    w, found = dpo_weights()
    close = torch.testing.assert_close
    close(found(splits.no_reweighting()), w.mean().expand(6))
    close(found(Split(reweight="none", population="running", running_mean=0.4)), torch.full_like(w, 0.4))
    close(found(Split(reweight="none", population="horizon")), w)
    close(found(Split(reweight="clip", clip_max=0.5)), w.clamp(max=0.5))
    close(found(Split(reweight="power", power=2.0)), w.square())
    close(found(Split(reweight="power", power=0.0)), torch.ones_like(w))
    close(found(Split(reweight=lambda samples: samples + 1)), w + 1)
    order = w.argsort()
    gains = torch.empty_like(w)
    gains[order[:2]], gains[order[2:4]], gains[order[4:]] = 0.1, 2.0, 3.0
    close(found(Split(reweight="tertiles", tertile_gains=(3.0, 2.0, 0.1), population="batch")), w * gains)
    low, high = w[order[1]].item(), w[order[3]].item()
    running = Split(
        reweight="tertiles", tertile_gains=(3.0, 2.0, 0.1), population="running", running_tertiles=(low, high)
    )
    close(found(running), w * torch.where(w > high, 3.0, torch.where(w >= low, 2.0, 0.1)))


def test_population_is_answers_or_tokens():
    """A long answer does not weigh more in DPO's mean; in PPO tokens are the samples."""
    loss = create("ppo")
    stats, batch, _ = make_batch(loss, LENGTHS)
    advantage = batch.token("advantage")
    plain = coefficients(loss, stats, batch)[1].logp
    c = coefficients(loss, stats, batch, splits.no_reweighting())[1].logp
    torch.testing.assert_close(c, plain * advantage.abs().mean() / advantage.abs())


@given(count=st.integers(0, 40), empty=st.integers(0, 5), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_thirds_have_one_size(count, empty, seed):
    torch.manual_seed(seed)
    samples = torch.randint(0, 4, (count + empty,)).double()
    members = torch.cat([torch.ones(count), torch.zeros(empty)]).bool()[torch.randperm(count + empty)]
    thirds = tertiles(samples, (~members).long())[members]
    sizes = [(thirds == third).sum().item() for third in range(3)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    for third in range(2):
        low, high = samples[members][thirds == third], samples[members][thirds == third + 1]
        assert not low.numel() or not high.numel() or low.max() <= high.min()


def test_schedules():
    split = splits.controlled_dpo(positive=(1.0, 0.2), negative=(0.0, 1.0), begin=0.2, finish=0.7)
    assert [split.at(s).weights for s in (0.0, 0.2, 0.45, 0.7, 1.0)] == [
        (1.0, 0.0),
        (1.0, 0.0),
        pytest.approx((0.6, 0.5)),
        pytest.approx((0.2, 1.0)),
        pytest.approx((0.2, 1.0)),
    ]
    assert splits.controlled_ppo().at(1.0).weights == (1.0, 0.5)
    assert splits.controlled_ppo(tertile_gains=(1.0, 1.0, 0.0)).reweight == "tertiles"
    assert splits.w_reinforce().weights == (0.1, 1.0)
    assert splits.psr().weights == splits.positive_only().weights == (1.0, 0.0)
    assert splits.nsr().weights == splits.negative_only().weights == (0.0, 1.0)


def test_horizon():
    dpo, ppo = losses.create("sigmoid"), losses.create("ppo")
    assert Split().horizon(dpo) == "pair" and Split(reweight="clip").horizon(ppo) == "token"
    assert splits.no_reweighting().horizon(dpo) == "batch"
    assert splits.no_reweighting("running", 0.5).horizon(ppo) == "token"
    assert Split(reweight="none", population="horizon").horizon(dpo) == "pair"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"progress": 1.5}, r"progress must lie in \[0, 1\]"),
        ({"progress": float("nan")}, "progress must lie in"),
        ({"positive": -0.1}, "at least 0 .else allow_negative=True.: got -0.1"),
        ({"negative": Linear(1.0, -1.0)}, "got -1.0"),
        ({"positive": float("inf")}, "must be finite"),
        ({"tertile_gains": (1.0, -2.0, 1.0)}, "got -2.0"),
        ({"reweight": "square"}, "reweight must be a function or one of identity, "),
        ({"by": "sign"}, "by must be one of role, direction"),
        ({"population": "call"}, "population must be one of"),
        ({"reweight": "none", "population": "running"}, "needs running_mean"),
        ({"reweight": "tertiles", "population": "running"}, "needs running_tertiles"),
        ({"clip_max": 0.0}, "clip_max must be above 0"),
        ({"power": -1.0}, "power at least 0"),
    ],
)
def test_bad_splits(arguments, message):
    with pytest.raises(ValueError, match=message):
        Split(**arguments)


def test_negative_weights_where_asked_for():
    assert Split(positive=-0.5, allow_negative=True).weights == (-0.5, 1.0)
    with pytest.raises(ValueError, match="begin 0.5, finish 0.2"):
        Linear(0.0, 1.0, 0.5, 0.2)
    with pytest.raises(ValueError, match="progress must lie in"):
        Split().at(-0.1)


SPLITS = {
    "positive": splits.positive_only(),
    "weights": Split(positive=0.3, negative=1.7),
    "flat": splits.no_reweighting(),
    "thirds": Split(reweight="tertiles", tertile_gains=(2.0, 1.0, 0.0), population="batch"),
    "of horizons": Split(reweight="none"),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("scratch", [0, 12 * ROW, 1 << 24])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("case", ["sigmoid", "simpo", "kto", "dapo-all", "cpo", "mixture"])
def test_all_operations_take_a_split(case, name, scratch):
    """The same gradient through all three, whatever is kept or recomputed."""
    problem, split = Problem(create(case)), SPLITS[name]
    loss, transform = problem.loss, {**problem.transform}
    names = loss.statistics
    fused = linear_loss(
        *problem.arguments(), loss, **problem.options(), split=split, scratch_bytes=scratch, **problem.side_inputs
    )
    got = torch.autograd.grad(fused.loss, problem.leaves)
    stats = linear_token_stats(*problem.arguments(), outputs=names, scratch_bytes=scratch, **problem.options())
    on_top = stats_loss(stats, problem.labels, loss, split=split, **problem.side_inputs)
    torch.testing.assert_close(on_top.loss, fused.loss)
    assert on_top.metrics.keys() == fused.metrics.keys()
    from_logits = token_stats(problem.logits(), problem.labels, outputs=names, **transform)
    of_logits = stats_loss(from_logits, problem.labels, loss, split=split, **problem.side_inputs)
    for want in (torch.autograd.grad(on_top.loss, problem.leaves), torch.autograd.grad(of_logits.loss, problem.leaves)):
        for mine, theirs in zip(got, want, strict=True):
            assert relative_error(mine, theirs) <= 1e-11
    # the value is that of the loss itself
    torch.testing.assert_close(fused.loss, problem.plain(), rtol=1e-11, atol=1e-12)


def test_stats_loss_equals_autograd_and_says_what_is_missing():
    problem = Problem(EntropyPairs())
    stats = problem.stats()
    got = torch.autograd.grad(stats_loss(stats, problem.labels, problem.loss).loss * 3, problem.leaves)
    for mine, want in zip(got, torch.autograd.grad(problem.plain() * 3, problem.leaves), strict=True):
        assert relative_error(mine, want) <= 1e-11
    few = token_stats(problem.logits(), problem.labels)
    with pytest.raises(ValueError, match="not asked for: entropy, lse, log_sum_sq_probs"):
        stats_loss(few, problem.labels, problem.loss)
    with pytest.raises(ValueError, match=r"logp must have the shape of labels \(6, 8\)"):
        stats_loss(few, problem.labels[:, 1:], losses.create("sft"))
    with pytest.raises(ValueError, match="must come from"):
        stats_loss(few, problem.labels, "sft")
    assert stats_loss(few, problem.labels, losses.create("sft")).metrics == {}


@pytest.mark.pairwise
@pytest.mark.parametrize("frozen", [frozenset(), HEAD_FROZEN, frozenset({"weight"})], ids=words)
@pytest.mark.parametrize("scratch", [0, 12 * ROW, 1 << 24])
@pytest.mark.parametrize("case", ["sigmoid", "kto", "dapo-all", "grpo-sequence", "orpo", "entropy-pairs"])
def test_gradients_of_the_parts_sum_to_the_whole_at_no_further_flop(case, scratch, frozen):
    problem = Problem(EntropyPairs() if case == "entropy-pairs" else create(case), frozen)
    arguments = {**problem.options(), "scratch_bytes": scratch, **problem.side_inputs}
    with CountGemms(problem.labels) as plain:
        linear_loss(*problem.arguments(), problem.loss, **arguments)
    with CountGemms(problem.labels) as count:
        found = linear_loss(*problem.arguments(), problem.loss, **arguments, split_gradients=True)
    parts = found.split_gradients
    got = dict(zip([n for n, t in problem.tensors.items() if t.requires_grad],
                   torch.autograd.grad(found.loss, problem.leaves), strict=True))  # fmt: skip
    assert set(got) == {kind for kind in ("hidden", "weight", "bias") if getattr(parts, kind)}
    for kind, whole in got.items():
        assert relative_error(sum(getattr(parts, kind).values()), whole) <= 1e-12
    # copies of rows leave less room for kept tiles, so a tight budget may recompute more, never beyond 4
    assert count.gemms == plain.gemms if scratch != 12 * ROW else plain.gemms <= count.gemms <= 4


def test_gradients_of_a_part_are_those_of_its_split():
    """Where all terms have sides, a part is what the loss makes of that side alone."""
    problem = Problem(create("sigmoid"))
    arguments = {**problem.options(), **problem.side_inputs}
    parts = linear_loss(*problem.arguments(), problem.loss, **arguments, split_gradients=True).split_gradients
    for name, split in (("positive", splits.positive_only()), ("negative", splits.negative_only())):
        alone = linear_loss(*problem.arguments(), problem.loss, **arguments, split=split)
        hidden, weight, bias = torch.autograd.grad(alone.loss, problem.leaves)
        for kind, want in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            assert relative_error(getattr(parts, kind)[name], want) <= 1e-12
    a, b = parts.weight["positive"].flatten(), parts.weight["negative"].flatten()
    torch.testing.assert_close(parts.norms()["weight"]["positive"], a.norm())
    torch.testing.assert_close(parts.inner()["weight"], a @ b)
    torch.testing.assert_close(parts.cosine()["weight"], (a @ b) / (a.norm() * b.norm()))
    assert parts.inner()["hidden"] == 0
    assert not parts.weight["rest"].any()


@pytest.mark.parametrize("case", ["sigmoid", "dapo"])
def test_gradients_of_thirds(case):
    problem = Problem(create(case), batch=12)
    arguments = {**problem.options(), **problem.side_inputs, "scratch_bytes": 10 * ROW}
    found = linear_loss(*problem.arguments(), problem.loss, **arguments, split_gradients="thirds")
    parts = found.split_gradients
    got = torch.autograd.grad(found.loss, problem.leaves)
    assert relative_error(sum(parts.weight.values()), got[1]) <= 1e-12
    for name, gains in (("top", (1.0, 0.0, 0.0)), ("middle", (0.0, 1.0, 0.0)), ("bottom", (0.0, 0.0, 1.0))):
        split = Split(reweight="tertiles", tertile_gains=gains, population="batch")
        alone = linear_loss(*problem.arguments(), problem.loss, **arguments, split=split)
        weight = torch.autograd.grad(alone.loss, problem.leaves)[1]
        assert weight.norm() > 0
        assert relative_error(parts.weight[name], weight) <= 1e-12


def test_what_backward_does_to_the_gradient_leaves_the_parts_alone():
    problem = Problem(create("sigmoid"))
    found = linear_loss(
        *problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs, split_gradients=True
    )
    before = {name: grad.clone() for name, grad in found.split_gradients.weight.items()}
    (found.loss * 7).backward()
    assert all(torch.equal(found.split_gradients.weight[name], grad) for name, grad in before.items())
    assert relative_error(problem.tensors["weight"].grad, 7 * sum(before.values())) <= 1e-12


def test_split_gradients_in_half_precision():
    problem = Problem(create("sigmoid"), dtype=torch.float16, softcap=None)
    found = linear_loss(
        *problem.arguments(), problem.loss, **problem.options(), **problem.side_inputs, split_gradients=True
    )
    found.loss.backward()
    whole = sum(found.split_gradients.weight.values())
    assert relative_error(problem.tensors["weight"].grad.float(), whole) <= 1e-3


def test_gradients_of_the_parts_have_the_rows_of_the_head():
    """Padded ones too, with zeros."""
    problem = Problem(create("dapo"))
    options = {**problem.options(), **problem.side_inputs, "split_gradients": True, "vocab_size": V - 5}
    problem.labels.clamp_(max=V - 6)
    found = linear_loss(*problem.arguments(), problem.loss, **options)
    found.loss.backward()
    for name in ("weight", "bias"):
        parts = getattr(found.split_gradients, name)
        whole = sum(parts.values())
        torch.testing.assert_close(whole, problem.tensors[name].grad, rtol=1e-12, atol=1e-15)
        assert (whole[-5:] == 0).all()


@pytest.mark.parametrize("population", ["horizon", "batch"])
@pytest.mark.parametrize("name", ["gpg", "topr"])
def test_more_sequences_than_tokens(name, population):
    """Populations of tokens are counted by token, however many sequences are empty."""
    torch.manual_seed(0)
    # the horizon is the sequence, and what weighs are tokens
    loss = losses.create(name, off_policy_mask_threshold=1e9)
    hidden, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 2, 4), (7, 4)))
    labels = torch.full((6, 2), -100)
    labels[3, 1], labels[5, 0], labels[5, 1] = 1, 2, 3
    advantage = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(6, 2)
    found = []
    for kept in (slice(None), [3, 5]):
        leaf = hidden[kept].requires_grad_()
        options = {"split": Split(reweight="none", population=population), "num_sequences": 2}
        linear_loss(leaf, weight, labels[kept], loss, advantage=advantage[kept], **options).loss.backward()
        found.append(leaf.grad[labels[kept] >= 0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_bad_split_gradients():
    problem = Problem(create("sigmoid"))
    arguments = {**problem.options(), **problem.side_inputs}
    with pytest.raises(ValueError, match='must be True, False, "sides" or "thirds": got \'halves\''):
        linear_loss(*problem.arguments(), problem.loss, **arguments, split_gradients="halves")
    with torch.no_grad():
        found = linear_loss(*problem.arguments(), problem.loss, **arguments, split_gradients=True)
    assert not found.split_gradients.hidden and not found.split_gradients.weight
    with pytest.raises(KeyError, match="no part 'positive': there is none"):
        found.split_gradients.weight["positive"]
    found = linear_loss(*problem.arguments(), problem.loss, **arguments, split_gradients=True).split_gradients
    for kind in ("hidden", "weight", "bias"):
        with pytest.raises(KeyError, match="no part 'pos': there is negative, positive, rest"):
            getattr(found, kind)["pos"]
    with pytest.raises(KeyError, match="no part 'positiv' .did you mean positive..: there is"):
        found.cosine("positiv")
