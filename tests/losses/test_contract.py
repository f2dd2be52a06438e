"""The clauses of the loss contract, over the whole registry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_po import losses
from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS
from fused_po.losses.contract import HORIZONS, total
from fused_po.ops.coefficients import coefficients
from fused_po.stats import STATISTICS, Stats
from tests.losses.cases import CASES, chunks_of, create, make_batch

LENGTHS = [5, 1, 3, 2, 4, 6]
cases = pytest.mark.parametrize("case", CASES)


def test_table_covers_the_registry():
    assert {name for name, _ in CASES.values()} == set(losses.names())


@cases
def test_declarations(case):
    loss = create(case)
    assert loss.horizon in HORIZONS
    assert loss.needs <= set(STATISTICS) | SIDE_INPUTS
    assert set(loss.differentiates) <= set(loss.statistics)


@cases
@settings(max_examples=10, deadline=None)
@given(capacity=st.integers(1, 30), seed=st.integers(0, 99))
def test_additive_over_whole_horizons(case, capacity, seed):
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS, seed=seed)
    value, triple = coefficients(loss, stats, batch)
    summed, pieces = 0.0, torch.zeros_like(triple.logp)
    for part, part_batch, chunk in chunks_of(loss, stats, batch, LENGTHS, capacity):
        part_value, part_triple = coefficients(loss, part, part_batch)
        summed += part_value
        pieces[torch.cat([torch.arange(a, b) for a, b in chunk.rows.ranges])] = part_triple.logp
    torch.testing.assert_close(summed, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces, triple.logp, rtol=1e-12, atol=1e-15)


@cases
def test_masked_rows_do_not_matter(case):
    loss = create(case)
    stats, batch, layout = make_batch(loss, LENGTHS)
    masked_stats, masked_batch, masked_layout = make_batch(loss, LENGTHS, masked=True)
    value, triple = coefficients(loss, stats, batch)
    masked_value, masked_triple = coefficients(loss, masked_stats, masked_batch)
    torch.testing.assert_close(masked_value, value, rtol=1e-12, atol=0)
    for got, want in zip(masked_triple, triple, strict=True):
        if want is not None:
            torch.testing.assert_close(masked_layout.fill(got), layout.fill(want), rtol=1e-12, atol=0)
            assert (got[~masked_batch.mask] == 0).all()


@cases
def test_needs_names_all_that_is_read(case):
    """Perturbing a field that ``needs`` does not name changes nothing; one that it names changes something."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS)
    value, triple = coefficients(loss, stats, batch)
    for name in STATISTICS:
        field = getattr(stats, name)
        other = ~field if field.dtype == torch.bool else field * 1.3 - 0.37
        moved, moved_triple = coefficients(loss, replace(stats, **{name: other}), batch)
        same = torch.equal(moved, value) and torch.equal(moved_triple.logp, triple.logp)
        assert same == (name not in loss.needs), name
    for kind in ("per_token", "per_sequence", "scalars"):
        for name, field in getattr(batch, kind).items():
            other = ~field if field.dtype == torch.bool else field * 1.7 + 0.11
            swapped = replace(batch, **{kind: {**getattr(batch, kind), name: other}})
            spread_only = kind == "per_sequence" and name in batch.per_token
            moved, moved_triple = coefficients(loss, stats, swapped)
            changed = not (torch.equal(moved, value) and torch.equal(moved_triple.logp, triple.logp))
            assert changed or spread_only, name


@cases
def test_local_to_its_horizon(case):
    """A coefficient does not depend on statistics of another horizon."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, triple = coefficients(loss, stats, batch)
    for part, _, chunk in chunks_of(loss, stats, batch, LENGTHS, 1):
        inside = torch.zeros(stats.logp.shape[0], dtype=torch.bool)
        inside[torch.cat([torch.arange(a, b) for a, b in chunk.rows.ranges])] = True
        assert part.logp.shape[0] == int(inside.sum())
        other = {
            name: torch.where(inside, value, ~value if value.dtype == torch.bool else value - 1.3)
            for name, value in stats.present().items()
        }
        _, moved = coefficients(loss, Stats(**other), batch)
        torch.testing.assert_close(moved.logp[inside], triple.logp[inside], rtol=1e-12, atol=0)


@cases
def test_coefficients_equal_numerical_derivatives(case):
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS, seed=3)

    def value(*fields):
        return total(loss(replace(stats, **dict(zip(loss.differentiates, fields, strict=True))), batch))

    leaves = [getattr(stats, name).clone().requires_grad_() for name in loss.differentiates]
    # PPO's detached old log-probs are given, so no loss here has a gradient that its value does not show
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-7)


@cases
def test_pattern_times_one_scalar_is_the_coefficient(case):
    loss = create(case)
    lengths = {"pair": [3, 5], "sequence": [4]}.get(loss.horizon, LENGTHS)
    stats, batch, _ = make_batch(loss, lengths)
    pattern = loss.pattern(batch)
    if pattern is None:
        assert loss.horizon == "token"
        return
    _, triple = coefficients(loss, stats, batch)
    ratio = triple.logp / pattern
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


@cases
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    logp=st.sampled_from([0.0, -1e-30, -1e4, -torch.inf]),
    other=st.sampled_from([0.0, -1.0, -1e4, -torch.inf]),
    masked=st.booleans(),
)
def test_finite_on_legal_input(case, lengths, logp, other, masked):
    """Log-prob 0 and -inf, empty and one-token sequences, ratios of 0 and infinity, margins of 1e4: never NaN."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, lengths * 2, masked=masked)
    stats = replace(stats, logp=torch.full_like(stats.logp, logp))
    per_token = {n: torch.full_like(v, other) if n.endswith("logp") else v for n, v in batch.per_token.items()}
    finite = max(other, -1e4)
    per_sequence = {n: torch.full_like(v, finite) if n.endswith("logp") else v for n, v in batch.per_sequence.items()}
    batch = replace(batch, per_token=per_token, per_sequence=per_sequence)
    value, triple = coefficients(loss, stats, batch)
    assert not value.isnan()
    for c in triple:
        assert c is None or not c.isnan().any()
    if logp > -torch.inf:
        assert all(c is None or c.isfinite().all() for c in triple)


@cases
def test_all_rows_masked_is_zero(case):
    loss = create(case)
    for masked in (False, True):
        stats, batch, _ = make_batch(loss, [0, 0, 0, 0], masked=masked)
        value, triple = coefficients(loss, stats, batch)
        assert value == 0
        assert all(c is None or (c == 0).all() for c in triple)


@cases
def test_side_inputs_are_checked(case):
    loss = create(case)
    reads = loss.needs & SIDE_INPUTS
    loss.check(reads)
    for name in reads - OPTIONAL:
        with pytest.raises(ValueError, match=f"needs {name}"):
            loss.check(reads - {name})
    for name in SIDE_INPUTS - reads:
        with pytest.raises(ValueError, match=f"does not read {name}"):
            loss.check(reads | {name})
    with pytest.raises(ValueError, match="unknown side input refs"):
        loss.check(reads | {"refs"})


def test_create_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"unknown loss 'dpo'.*sigmoid"):
        losses.create("dpo")
    with pytest.raises(ValueError, match="has no hyper-parameter betta; it has beta"):
        losses.create("sigmoid", betta=0.1)
    with pytest.raises(ValueError, match="registered already"):
        losses.register("sigmoid")(type(losses.create("sft")))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("sigmoid", {"beta": -0.1}),
        ("sigmoid", {"beta": float("nan")}),
        ("ipo", {"beta": 0.0}),
        ("conservative", {"label_smoothing": 0.6}),
        ("simpo", {"label_smoothing": -0.1}),
        ("ppo", {"epsilon": -1.0}),
        ("ppo", {"epsilon_high": -1.0}),
        ("ppo", {"dual_clip": 1.0}),
        ("dapo", {"delta": 0.0}),
        ("kto", {"desirable_weight": -1.0}),
    ],
)
def test_hyperparameters_have_ranges(name, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must lie in"):
        losses.create(name, **bad)
