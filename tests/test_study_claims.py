"""How claims are judged: on curves about nothing, on planted effects, and case by case."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import numpy
import pytest

from fused_po.study.claims import Claim, Curves, decide, judge
from fused_po.study.estimates import LEVEL, Estimate, holm, power, ratio, seeds_for, two_sided_p, written
from fused_po.study.paper import CLAIMS, CONFIRMATORY, first_at
from fused_po.study.run import Point, Results
from fused_po.study.settings import ARMS, METHODS, SEEDS

STUDIES, CHECKPOINTS = 2000, 9
# two and a third binomial errors above the level in 2,000 studies
MOST = 0.0615

SIDES = ("positive", "negative")
OF_FULL = (
    *("cosine", "cosine/positive", "cosine/negative", "successive", "offset_cosine"),
    *(f"offset_norms/{side}" for side in SIDES),
)
OF_ARMS = ("entropy/held_out", "kl/held_out", "dpo_loss/held_out", "reward/held_out", "dpo_loss/train")


@pytest.fixture
def frozen() -> Iterator[None]:
    """statsmodels collects garbage at every call, for a quarter of a second where much is loaded."""
    # loads what it needs
    holm([0.5])
    gc.freeze()
    yield
    gc.unfreeze()


def noise(draw: numpy.random.Generator, correlation: float) -> numpy.ndarray:
    """Curves about 0 in which each checkpoint keeps so much of the one before: (studies, seeds, checkpoints)."""
    shocks = draw.normal(size=(STUDIES, SEEDS, CHECKPOINTS))
    found = numpy.empty_like(shocks)
    found[..., 0] = shocks[..., 0]
    for step in range(1, CHECKPOINTS):
        found[..., step] = correlation * found[..., step - 1] + math.sqrt(1 - correlation**2) * shocks[..., step]
    return found


def studies_about_nothing(correlation: float) -> Curves:
    """G and all else that claims read without any structure, alike in all arms and methods."""
    draw = numpy.random.default_rng(round(100 * correlation))
    arrays = {}
    for method in METHODS:
        for metric in OF_FULL:
            arrays[method, "full", metric] = noise(draw, correlation)
        for arm in ARMS[method]:
            for metric in OF_ARMS:
                arrays[method, arm, metric] = noise(draw, correlation)
            # what two arms are compared at has to move in both; all begin at the same start
            fall = numpy.abs(arrays[method, arm, "dpo_loss/train"])
            arrays[method, arm, "dpo_loss/train"] = fall[..., :1] - fall.cumsum(-1)
    return Curves.of(arrays)


def decided(values: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """p and verdict, (studies, claims) each, as a report has them, of the numbers of studies (studies, claims, seeds)
    whose claims are all confirmatory.
    """
    found = [decide(study, [True] * values.shape[1]) for study in values]
    return (numpy.array([[one[place] for one in study] for study in found]) for place in (0, 2))  # type: ignore


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_claims_about_nothing_get_a_verdict_as_rarely_as_they_should(
    correlation: float, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = studies_about_nothing(correlation)
    values = numpy.stack([claim.measure(curves) for claim in CONFIRMATORY], 1)  # (studies, claims, seeds)
    assert values.shape == (STUDIES, len(CONFIRMATORY), SEEDS) and numpy.isfinite(values).all()
    p, verdicts = decided(values)
    alone, wrong = (p <= LEVEL).mean(0), verdicts != "not shown"
    with capsys.disabled():
        print(
            f"\n{STUDIES} studies about nothing, correlation {correlation}: without correction a claim is wrong in "
            f"{alone.min():.4f} to {alone.max():.4f} of them; by its verdict in at most {wrong.mean(0).max():.4f}, any "
            f"of {len(CONFIRMATORY)} in {wrong.any(1).mean():.4f}"
        )
    # a test that never speaks would pass the upper bounds
    assert alone.min() >= 0.03 and alone.max() <= MOST
    assert set(verdicts.flat) == {"supported", "contradicted", "not shown"}
    assert wrong.mean(0).max() <= MOST
    # of all claims together
    assert 0.02 <= wrong.any(1).mean() <= MOST


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("others", [0.0, 1.0])
def test_effects_of_one_standard_deviation_are_found(others: float, capsys: pytest.CaptureFixture[str]) -> None:
    """By Holm's first step, where all other claims are about nothing, and no less often where they are not."""
    draw = numpy.random.default_rng(7)
    count = len(CONFIRMATORY)
    values = draw.normal(size=(STUDIES, count, SEEDS)) + numpy.array([1.0] + [others] * (count - 1))[:, None]
    _, verdicts = decided(values)
    share, said = (verdicts[:, 0] == "supported").mean(), power(SEEDS, count)
    assert not (verdicts[:, 0] == "contradicted").any()
    with capsys.disabled():
        print(f"\npower at {SEEDS} seeds, {count} claims, others at {others}: {share:.3f}, on paper {said:.3f}")
    assert said >= 0.8 and share >= 0.8
    if not others:
        error = math.sqrt(said * (1 - said) / STUDIES)
        assert said - 3 * error <= share <= said + 3 * error + 0.02
    # one seed fewer than that many is not enough
    assert power(seeds_for(0.8, count) - 1, count) < 0.8 <= power(seeds_for(0.8, count), count)


def test_claims_are_few_and_say_where_they_come_from() -> None:
    assert len(CONFIRMATORY) <= 13 and len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert all("v1" in one.source or one.source.startswith("derived") for one in CONFIRMATORY)


def _claim(confirmatory: bool = True, metric: str = "number") -> Claim:
    measure = lambda curves: curves.array("dpo", metric)[..., 0]  # noqa: E731
    return Claim("text", "source", "number", "g", measure, confirmatory=confirmatory)


def _curves(values: list[float], metric: str = "number") -> Curves:
    return Curves(Results([Point(seed, "dpo", "full", 0, metric, value) for seed, value in enumerate(values)]))


@pytest.mark.parametrize(
    "values, said",
    [
        ([1.0, 1.1, 0.9], "supported"),
        ([-1.0, -1.1, -0.9], "contradicted"),
        # signs need not agree
        ([1.0, 1.1, 0.9, 1.2, 0.8, 1.0, -0.05, 1.1], "supported"),
        ([1.0, 1.0, -0.1], "not shown"),
        ([0.1, 5.0, 0.1], "not shown"),
        # 3.8 standard errors from 0: for three seeds 4.3 are needed
        ([1.0, 1.5, 2.5], "not shown"),
        ([1.0, 1.5, 2.5, 2.0], "supported"),
        ([1.0, math.nan, 0.9], "not measured"),
        ([1.0, math.inf, 0.9], "not measured"),
        ([math.nan], "not measured"),
        ([0.0, 0.0, 0.0], "not shown"),
        # alike to all digits, as shares of few answers may be: what three seeds vary by is not known
        ([0.25, 0.25, 0.25], "not shown"),
        ([-0.25] * 6, "contradicted"),
        ([1.0, 1.1], "too few seeds"),
        ([1.0], "too few seeds"),
    ],
)
def test_verdicts(values: list[float], said: str) -> None:
    (found,) = judge(_curves(values), [_claim()])
    assert found.verdict == said and found.values == pytest.approx(values, nan_ok=True)
    assert judge(_curves(values), [_claim()], smoke=True)[0].verdict == "smoke run"
    (looked,) = judge(_curves(values), [_claim(confirmatory=False)])
    assert looked.verdict == "exploratory" and math.isnan(looked.p_holm)


def test_a_claim_answers_for_the_others() -> None:
    values = [1.0, 1.5, 2.5, 2.0]
    alone = judge(_curves(values), [_claim()])[0]
    # what is looked at besides costs nothing, what was not measured does
    beside = judge(_curves(values), [_claim(), *[_claim(False)] * 5])[0]
    among = judge(_curves(values), [_claim(), *[_claim(metric="missing")] * 4])
    assert alone.verdict == beside.verdict == "supported" and alone.p_holm == alone.p == beside.p_holm
    assert among[0].p_holm == pytest.approx(5 * alone.p) and among[0].verdict == "not shown"
    assert {one.verdict for one in among[1:]} == {"not measured"}


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, math.nan, 0.02]) == pytest.approx([0.03, math.nan, 0.04], nan_ok=True)
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_p_of_what_is_alike_or_not_defined() -> None:
    table = numpy.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 2.0, 3.0]])
    assert two_sided_p(table).tolist() == pytest.approx([1.0, 0.25, math.nan, math.nan, 0.0741799], nan_ok=True)
    assert math.isnan(two_sided_p(numpy.array([1.0])))


@pytest.mark.parametrize(
    "freedom, t", [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (4, 2.77644511), (9, 2.26215716), (30, 2.0422725)]
)
def test_five_percent_of_students_t_lie_beyond_its_quantile(freedom: int, t: float) -> None:
    values = numpy.arange(freedom + 1.0)
    error = values.std(ddof=1) / math.sqrt(freedom + 1)
    assert two_sided_p(values - values.mean() + t * error) == pytest.approx(0.05, rel=1e-6)
    # and the interval of the mean then ends at 0
    found = Estimate.of((values - values.mean() + t * error).tolist())
    assert found.low == pytest.approx(0.0, abs=1e-7 * error) and found.high == pytest.approx(2 * t * error)


@pytest.mark.parametrize("shift", [-8.0, -1.0, 0.0, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("seeds", [3, 20])
def test_effect_sizes_lie_in_their_intervals(shift: float, seeds: int) -> None:
    values = (numpy.random.default_rng(seeds).normal(size=seeds) + shift).tolist()
    found, mirrored = Estimate.of(values), Estimate.of([-value for value in values])
    assert found.d_low < found.d < found.d_high
    assert (mirrored.d_low, mirrored.d, mirrored.d_high) == pytest.approx((-found.d_high, -found.d, -found.d_low))
    # the interval leaves 0 out where the mean is told from 0
    assert (found.d_low > 0 or found.d_high < 0) == bool(two_sided_p(numpy.array(values)) < LEVEL)


@pytest.mark.parametrize("seeds, effect", [(3, 2.0), (5, 0.8), (20, 0.8)])
def test_intervals_of_effects_hold_the_truth(seeds: int, effect: float) -> None:
    draw = numpy.random.default_rng(3)
    found = [Estimate.of(row) for row in (draw.normal(size=(400, seeds)) + effect).tolist()]
    # Hedges' g has no bias, within three standard errors; 95 % of intervals, within three binomial errors
    each = numpy.array([one.d for one in found])
    assert each.mean() == pytest.approx(effect, abs=3 * each.std() / 20)
    assert 0.917 <= numpy.mean([one.d_low <= effect <= one.d_high for one in found]) <= 0.983


def test_words_of_what_is_not_defined() -> None:
    assert written([1.0, 2.0, 3.0]) == "2 ± 0.58" and written([2.0]) == "2"
    assert written([1.0, math.nan]) == "undefined in 1 of 2 seeds"
    assert Estimate.of([2.0]).text == "2" and Estimate.of([2.0]).effect == "-"
    assert Estimate.of([1.0, math.nan]).text == "undefined" and math.isnan(ratio(1.0, 0.0))


def test_arms_are_compared_where_they_have_come_equally_far() -> None:
    (claim,) = [one for one in CONFIRMATORY if "equal" in one.number]
    steps = numpy.linspace(0.0, 1.0, CHECKPOINTS)

    def curves(speed: float, extra: float) -> Curves:
        return Curves.of(
            {
                ("dpo", "full", "dpo_loss/train"): -steps[None],
                ("dpo", "full", "dpo_loss/held_out"): steps[None] ** 2,
                ("dpo", "no reweighting", "dpo_loss/train"): -speed * steps[None],
                ("dpo", "no reweighting", "dpo_loss/held_out"): (speed * steps[None]) ** 2 + extra,
            }
        )

    # one arm that is only faster overfits no more; the straight lines between checkpoints leave little
    for speed in (0.5, 2.0, 4.0):
        assert claim.measure(curves(speed, 0.0))[0] == pytest.approx(0.0, abs=0.05)
        assert claim.measure(curves(speed, 0.3))[0] == pytest.approx(0.3, abs=0.05)
    # what never moves can't be compared, and what lacks a number neither
    assert math.isnan(claim.measure(curves(0.0, 0.0))[0])
    assert math.isnan(claim.measure(curves(2.0, math.nan))[0])


def test_margins_that_spread_are_no_overfitting() -> None:
    """Held-out pairs that fare as those in training do: whatever two arms make of their margins, neither overfits."""
    claims = [one for one in CLAIMS if "equal" in one.number]
    assert len(claims) == 2
    steps, draw = numpy.linspace(0.0, 1.0, CHECKPOINTS), numpy.random.default_rng(5)
    arrays = {}
    for arm, spread in (("full", 0.5), ("no reweighting", 3.0)):
        margins = 2.0 * steps[:, None] * (1.0 + spread * draw.normal(size=200))  # (checkpoints, pairs)
        loss = numpy.logaddexp(0.0, -margins).mean(1)
        for part in ("train", "held_out"):
            arrays["dpo", arm, f"dpo_loss/{part}"] = loss[None]
        arrays["dpo", arm, "accuracy/held_out"] = 1.0 - loss[None]
    for claim in claims:
        assert claim.measure(Curves.of(arrays))[0] == pytest.approx(0.0, abs=1e-9)


def test_first_at_goes_by_the_first_time() -> None:
    x, y = numpy.array([0.0, 2.0, 1.0, 4.0]), numpy.array([0.0, 20.0, 99.0, 40.0])
    assert first_at(numpy.array([1.0, 2.0, 3.0]), x, y).tolist() == [10.0, 20.0, 30.0]


def test_decisions_are_by_p_after_holm() -> None:
    values = numpy.array([[1.0, 1.5, 2.5, 2.0], [-1.0, -1.1, -0.9, -1.0], [1.0, -1.0, 2.0, -2.0]])
    among = decide(values, [True, True, True])
    assert [one[2] for one in among] == ["supported", "contradicted", "not shown"]
    p = [one[0] for one in among]
    assert [one[1] for one in among] == pytest.approx([2 * p[0], 3 * p[1], p[2]])
    # with three more about nothing the first is too little
    more = decide(numpy.concatenate([values, *[values[2:]] * 3]), [True] * 6)
    assert more[0][0] == p[0] and more[0][1] == pytest.approx(5 * p[0]) and more[0][2] == "not shown"
    # what is exploratory neither pays nor counts
    assert decide(values, [True, True, False])[2] == (p[2], pytest.approx(math.nan, nan_ok=True), "exploratory")
    assert decide(values, [True, False, False])[0][1] == p[0]
