"""Parts of a loss over the whole of D: what they are, that they sum, and that no cut of D into batches shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_po import losses
from fused_po.diagnostics import Examples, gradient_alignment, learning_dynamics
from fused_po.diagnostics.examples import joined
from fused_po.diagnostics.parts import ALL_PARTS, FLAT, PARTS, THIRDS, independent, take_apart
from tests.losses.cases import CASES, create
from tests.test_alignment import Policy, examples, stats_of

SIDES = ("positive", "negative")
SUMS = {
    "whole": (*SIDES, "rest"),
    "positive": [f"positive/{third}" for third in THIRDS],
    "negative": [f"negative/{third}" for third in THIRDS],
}


def cut(whole: Examples, rows: list[list[int]], paired: bool) -> list[Examples]:
    """Batches of some pairs, or sequences, of an even number of sequences."""
    half = whole.labels.shape[0] // 2

    def taken(value, own):
        return value if not isinstance(value, torch.Tensor) or value.ndim == 0 else value[own]

    found = []
    for own in rows:
        index = torch.tensor([*own, *(half + one for one in own)] if paired else own)
        width = int((whole.labels[index] >= 0).any(0).nonzero().max()) + 1
        side = {name: taken(value, index) for name, value in whole.side_inputs.items()}
        side = {name: value[:, :width] if value.ndim == 2 else value for name, value in side.items()}
        inputs = {name: value[index, :width] for name, value in whole.inputs.items()}
        found.append(Examples(inputs, whole.labels[index, :width], side))
    return found


def uneven(loss, count: int = 8) -> Examples:
    """Sequences of different lengths, so that the batches of a cut are of different widths."""
    found = examples(loss, 4, count)
    for row in range(count):
        found.labels[row, 2 + row % 4 :] = -100
    side = {
        name: torch.where(found.labels >= 0, value, torch.zeros_like(value)) if value.ndim == 2 else value
        for name, value in found.side_inputs.items()
    }
    return Examples(found.inputs, found.labels, side)


@pytest.mark.parametrize("case", CASES)
def test_no_cut_into_batches_shows(case):
    """Thirds, means, normalisers, and losses that compare what is in a batch: all are of the whole of D."""
    loss = create(case)
    whole = uneven(loss)
    target = [examples(None, 3)]
    found = [
        gradient_alignment(Policy(), batches, loss, target, method="exact", stats=stats_of)
        for batches in ([whole], cut(whole, [[0, 1], [2], [3]], True))
    ]
    scale = max(abs(found[0][part]) for part in PARTS)
    for part in ALL_PARTS:
        assert found[1][part] == pytest.approx(found[0][part], rel=1e-9, abs=1e-12 * (1 + scale)), part


def test_odd_batches_of_single_answers():
    loss = create("dapo-all")
    whole = uneven(loss)
    cuts = [[whole], cut(whole, [[0, 1, 2], [3, 4, 5, 6, 7]], False)]
    first, second = (gradient_alignment(Policy(), one, loss, [examples(None, 3)], stats=stats_of) for one in cuts)
    for part in PARTS:
        assert second[part] == pytest.approx(first[part], rel=1e-6, abs=1e-9)
    cuts = [[whole], cut(whole, [[0], [1, 2, 3]], True)]
    dynamics = [learning_dynamics(Policy(), one, loss, stats=stats_of).flat() for one in cuts]
    assert dynamics[1] == pytest.approx(dynamics[0], rel=1e-9)


@pytest.mark.parametrize("case", ["sigmoid", "ppo-all", "dapo", "mixture", "sft", "kto", "bco"])
def test_thirds_of_a_side_are_a_third_of_it_each_and_ordered_by_weight(case):
    loss = create(case)
    taken = take_apart(Policy(), [examples(loss, 1, 12)], loss, stats_of)
    weight = loss.weight(taken.parts["whole"].logp, taken.batch)
    unit = taken.batch.mean_per_sequence if loss.weighs_sequences else (lambda values: values)
    for side in SIDES:
        sizes, ranges = [], []
        for third in THIRDS:
            own = taken.thirds[f"{side}/{third}"]
            assert not (own & (taken.role == {"positive": -1, "negative": 1}[side])).any()
            assert torch.equal(taken.parts[f"{side}/{third}"].logp != 0, own & (taken.parts[side].logp != 0))
            members = unit(own.double()) > 0
            sizes.append(int(members.sum()))
            ranges.append(unit(weight)[members])
        assert max(sizes) - min(sizes) <= 1, (side, sizes)
        for upper, lower in itertools.pairwise(ranges):
            assert not len(upper) or not len(lower) or upper.min() >= lower.max() - 1e-12


def sides_of_thirds(loss, data: Examples) -> dict[str, tuple[int, int]]:
    """Of each third of all tokens, how many are on which side."""
    taken = take_apart(Policy(), [data], loss, stats_of)
    return {
        third: tuple(int(((taken.parts[third].logp != 0) & (taken.role == sign)).sum()) for sign in (1, -1))
        for third in THIRDS
    }


def test_equal_weights_are_not_sorted_by_side():
    # at the first update of DPO the policy is the reference, and all pairs weigh the same
    loss, count = losses.create("sigmoid"), 60
    data = examples(None, 1, count)
    data.labels[:] = 1
    with torch.no_grad():
        logp = stats_of(Policy(), data.inputs, data.labels, ("logp",)).logp
    data = Examples(data.inputs, data.labels, {"ref_logp": logp.sum(1)})
    width = data.labels.shape[1]
    assert sides_of_thirds(loss, data) == dict.fromkeys(THIRDS, (10 * width, 10 * width))
    # and PPO's, where every answer is as good or as bad as another
    policy = losses.create("ppo")
    sign = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)
    data = Examples(data.inputs, data.labels, {"advantage": sign})
    for positive, negative in sides_of_thirds(policy, data).values():
        assert positive == negative == 10 * width


def test_ties_neither_read_nor_move_the_random_state():
    loss, data, found = create("sigmoid-zero-beta"), examples(create("sigmoid-zero-beta"), 1, 24), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        model = Policy()
        torch.random.set_rng_state(before)
        found.append(take_apart(model, [data], loss, stats_of).thirds["top"])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(*found) and found[0].any()


def test_few_parts_are_measured_and_the_others_are_their_sums():
    sums = independent(PARTS)
    assert len({one for counts in sums.values() for one in counts}) == 9
    assert len({one for counts in independent(ALL_PARTS).values() for one in counts}) == 17
    assert independent(("whole",)) == {"whole": {"whole": 1}}
    three = independent(("whole", *SIDES, "rest"))
    assert three["whole"] == {"positive": 1, "negative": 1, "rest": 1}
    of_sides = {f"{side}/{third}": 1 for side in SIDES for third in THIRDS}
    assert sums["top"] == {**of_sides, "middle": -1, "bottom": -1}
    assert independent(ALL_PARTS)["rest" + FLAT] == {"rest": 1}


def test_as_many_backwards_as_parts_are_measured(monkeypatch):
    from fused_po.diagnostics import alignment

    calls = []
    real = alignment.gradients
    monkeypatch.setattr(alignment, "gradients", lambda *given, **more: calls.append(1) or real(*given, **more))
    loss = create("dapo-all")
    for parts, wanted in ((PARTS, 9), (("whole", *SIDES), 3), (("whole",), 1)):
        calls.clear()
        gradient_alignment(
            Policy(), [examples(loss, 1)], loss, [examples(None, 3)], method="exact", parts=parts, stats=stats_of
        )
        # one is of D'
        assert len(calls) == 1 + wanted
    # DPO has no rest, and what is 0 everywhere takes none
    calls.clear()
    loss = create("sigmoid")
    gradient_alignment(
        Policy(), [examples(loss, 1)], loss, [examples(None, 3)], method="exact", parts=PARTS, stats=stats_of
    )
    assert len(calls) == 1 + 8


@pytest.mark.parametrize("method", ["exact", "directional"])
@pytest.mark.parametrize("case", ["sigmoid", "dapo-all", "mixture", "orpo"])
def test_sums_hold(case, method):
    loss = create(case)
    found = gradient_alignment(Policy(), [examples(loss, 1)], loss, [examples(None, 3)], method=method, stats=stats_of)
    scale = sum(abs(found[part]) for part in (*SIDES, "rest"))
    assert scale > 0
    for suffix in ("", FLAT):
        for part, others in (*SUMS.items(), ("whole", (*THIRDS, "rest"))):
            total = sum(found[other + suffix] for other in others)
            assert total == pytest.approx(found[part + suffix], rel=1e-12, abs=1e-13 * scale)


def test_batches_that_make_no_whole():
    loss = create("kto")
    one, two = examples(loss, 1), examples(loss, 2)

    def with_side(data: Examples, **side) -> Examples:
        return Examples(data.inputs, data.labels, {**data.side_inputs, **side})

    other = with_side(two, kl=torch.tensor(0.7))
    with pytest.raises(ValueError, match=r"kl differs between batches \(0.3 to 0.7\)"):
        joined([one, other])
    assert joined([one, two]).side_inputs["kl"] == 0.3
    policy = create("dapo-all")
    one, two = examples(policy, 1), examples(policy, 2)
    fewer = {name: value for name, value in two.side_inputs.items() if name != "old_logp"}
    with pytest.raises(ValueError, match="only some batches have old_logp"):
        joined([one, Examples(two.inputs, two.labels, fewer)])
    with pytest.raises(ValueError, match="advantage is given per sequence in some batches and per token in others"):
        joined([one, with_side(two, advantage=torch.ones(6))])
    with pytest.raises(ValueError, match=r"advantage must have shape \(6,\) or \(6, 6\): got \(5,\)"):
        joined([one, with_side(two, advantage=torch.ones(5))])
    with pytest.raises(ValueError, match="a row for each sequence"):
        joined([Examples({}, torch.ones(5, dtype=torch.int64))])


def test_what_was_joined_comes_apart_again():
    data = [examples(create("dapo-all"), seed, count) for seed, count in ((1, 4), (2, 2))]
    whole = joined(data)
    for index, one in enumerate(data):
        assert torch.equal(whole.part(index, whole.labels), one.labels)
        assert torch.equal(whole.part(index, whole.side_inputs["advantage"]), one.side_inputs["advantage"])
    # first halves first
    assert torch.equal(whole.labels[:3], torch.cat([data[0].labels[:2], data[1].labels[:1]]))


def test_unknown_parts():
    loss = create("sigmoid")
    given = (Policy(), [examples(loss, 1)], loss, [examples(None, 3)])
    with pytest.raises(ValueError, match="G has no part 'positive/tops' .did you mean positive/top"):
        gradient_alignment(*given, parts=["positive/tops"], stats=stats_of)
    with pytest.raises(ValueError, match="no part of G asked for"):
        gradient_alignment(*given, parts=[], stats=stats_of)
    assert set(gradient_alignment(*given, parts=["top", "whole"], stats=stats_of).values) == {"top", "whole"}
