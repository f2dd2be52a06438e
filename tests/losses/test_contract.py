"""The clauses of the loss contract, over the whole registry."""

from __future__ import annotations

from contextlib import contextmanager
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
    assert {name for name, _ in CASES.values() if isinstance(name, str)} == set(losses.names())


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


@pytest.mark.parametrize("case", [case for case in CASES if case != "sigmoid-zero-beta"])
def test_needs_names_all_that_is_read(case):
    """Perturbing a field that ``needs`` does not name changes nothing; one that it names changes something."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS)
    value, triple = coefficients(loss, stats, batch)
    for name in STATISTICS:
        field = getattr(stats, name)
        # not monotone: an order must change too
        other = ~field if field.dtype == torch.bool else field.flip(0) * 1.3 - 0.37
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
    """A coefficient depends neither on statistics nor on side inputs of another horizon: a loss that reads a batch
    statistic, even detached, must say so."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS)
    _, triple = coefficients(loss, stats, batch)
    for part, _, chunk in chunks_of(loss, stats, batch, LENGTHS, 1):
        inside = torch.zeros(stats.logp.shape[0], dtype=torch.bool)
        inside[torch.cat([torch.arange(a, b) for a, b in chunk.rows.ranges])] = True
        own = torch.zeros(len(LENGTHS), dtype=torch.bool)
        own[torch.cat([torch.arange(a, b) for a, b in chunk.sequences or ((0, 0),)])] = True
        assert part.logp.shape[0] == int(inside.sum())
        other = Stats(**{name: _changed(value, inside) for name, value in stats.present().items()})
        elsewhere = replace(
            batch,
            per_token={name: _changed(value, inside) for name, value in batch.per_token.items()},
            per_sequence={
                name: _changed(value, own) if chunk.sequences else value for name, value in batch.per_sequence.items()
            },
        )
        _, moved = coefficients(loss, other, elsewhere)
        torch.testing.assert_close(moved.logp[inside], triple.logp[inside], rtol=1e-12, atol=0)


def _changed(value, kept):
    return torch.where(kept, value, ~value if value.dtype == torch.bool else value - 1.3)


def test_the_perturbation_finds_a_hidden_batch_statistic():
    """Normalised by a mean over the batch, even a detached one, a loss is not local to a pair."""

    class Hidden(losses.pairwise.Sigmoid):
        def of_margin(self, margin):
            return super().of_margin(margin - margin.detach().mean())

    stats, batch, _ = make_batch(Hidden(), LENGTHS)
    _, triple = coefficients(Hidden(), stats, batch)
    inside = batch.spread(torch.tensor([True, False, False] * 2))  # the first pair
    other = Stats(**{name: _changed(value, inside) for name, value in stats.present().items()})
    _, moved = coefficients(Hidden(), other, batch)
    assert not torch.allclose(moved.logp[inside], triple.logp[inside], rtol=1e-6)


@contextmanager
def frozen_detach(seen):
    """Detached tensors keep the values of the first run, so that a difference quotient sees what autograd sees."""
    recording, place, real = not seen, iter(list(seen)), torch.Tensor.detach

    def detach(tensor):
        if recording:
            seen.append(real(tensor).clone())
            return seen[-1]
        return next(place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", detach)
        yield


@cases
def test_coefficients_equal_numerical_derivatives(case):
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS, seed=3)
    _, triple = coefficients(loss, stats, batch)
    seen, step = [], 1e-6
    with frozen_detach(seen):
        total(loss(stats, batch))
    for name in loss.differentiates:
        field, slopes = getattr(stats, name), []
        for row in range(field.shape[0]):
            values = []
            for sign in (1, -1):
                moved = field.clone()
                moved[row] += sign * step
                with frozen_detach(seen):
                    values.append(total(loss(replace(stats, **{name: moved}), batch)))
            slopes.append((values[0] - values[1]) / (2 * step))
        torch.testing.assert_close(getattr(triple, name), torch.stack(slopes), rtol=1e-6, atol=1e-9)
        assert getattr(triple, name).abs().max() > 0 or case == "sigmoid-zero-beta"


# a call that is one horizon larger than the budget still costs 3 GEMMs with these
PATTERNED = {
    *("sigmoid", "sigmoid-ld", "sigmoid-wpo", "sigmoid-zero-beta", "sigmoid_norm", "conservative", "robust", "hinge"),
    *("ipo", "exo_pair", "discopop", "simpo", "cpo-hinge", "kto", "bco", "apo_zero_unpaired"),
}


@cases
def test_pattern_times_one_scalar_is_the_coefficient(case):
    loss = create(case)
    lengths = {"pair": [3, 5], "sequence": [4]}.get(loss.horizon, LENGTHS)
    stats, batch, _ = make_batch(loss, lengths)
    pattern = loss.pattern(batch)
    assert (pattern is not None) == (case in PATTERNED), f"PATTERNED lists the cases with a pattern: see to {case!r}"
    if pattern is None:
        return
    _, triple = coefficients(loss, stats, batch)
    ratio = triple.logp / pattern
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


@cases
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    logp=st.sampled_from([0.0, -1e-30, -1.0, -1e4, -torch.inf]),
    mirrored=st.booleans(),
    other=st.sampled_from([0.0, -1.0, -1e4, -torch.inf]),
    advantage=st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4]),
    weight=st.sampled_from([0.0, 1.0]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_finite_on_legal_input(case, lengths, logp, mirrored, other, advantage, weight, masked, dtype):
    """Log-prob 0 and -inf, empty and one-token sequences, ratios of 0 and infinity, advantage 0, margins of +-1e4:
    never NaN, and finite as long as the policy gives the label some probability."""
    loss = create(case)
    stats, batch, _ = make_batch(loss, lengths * 2, masked=masked)
    # mirrored: only the chosen half is extreme, or only the rejected
    extreme = torch.where(batch.chosen == mirrored, logp, torch.full_like(stats.logp, -0.5))
    present = {name: value if value.dtype == torch.bool else value.to(dtype) for name, value in stats.present().items()}
    stats = Stats(**{**present, "logp": extreme.to(dtype)})
    fill = {"advantage": advantage, "importance_weight": weight, "row_weight": weight}
    fill |= dict.fromkeys(("ref_logp", "old_logp", "sampling_logp"), other)
    per_token = {
        name: torch.full_like(value, fill[name]).to(dtype) if name in fill else value
        for name, value in batch.per_token.items()
    }
    per_sequence = {
        name: torch.full_like(value, max(other, -1e4)) if name.endswith("logp") else value
        for name, value in batch.per_sequence.items()
    }
    batch = replace(batch, per_token=per_token, per_sequence=per_sequence)
    value, triple = coefficients(loss, stats, batch)
    assert not value.isnan()
    for c in triple:
        assert c is None or not c.isnan().any()
    if logp > -torch.inf:
        assert value.isfinite()
        assert all(c is None or c.isfinite().all() for c in triple)
    with torch.no_grad():
        metrics = loss.metrics(stats, batch)
    assert all(metric.dim() == 0 for metric in metrics.values())


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
    with pytest.raises(ValueError, match="unknown argument or side input refs"):
        loss.check(reads | {"refs"})


def test_create_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"unknown loss 'dpo'.*sigmoid"):
        losses.create("dpo")
    with pytest.raises(ValueError, match=r"has no hyper-parameter betta \(did you mean beta\?\); it has beta"):
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
        ("robust", {"label_smoothing": 0.5}),
        ("exo_pair", {"label_smoothing": 0.0}),
        ("discopop", {"discopop_tau": 0.0}),
        ("sppo_hard", {"beta": 0.0}),
        ("cpo", {"loss_type": "ipo", "beta": 0.0}),
        ("sigmoid", {"ld_alpha": 1.5}),
        ("bco", {"shift_weight": 1.5}),
        ("sapo", {"sapo_temperature_pos": 0.0}),
        ("dr_grpo", {"max_completion_length": 0}),
        ("grpo", {"top_entropy_quantile": 1.2}),
        ("beta_dpo", {"kept": 0.0}),
        ("clip_cov", {"clip_cov_ratio": 0.0}),
        ("asymre", {"delta_v": float("inf")}),
    ],
)
def test_hyperparameters_have_ranges(name, bad):
    with pytest.raises(ValueError, match=f"{list(bad)[-1]} must lie in"):
        losses.create(name, **bad)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("sigmoid", {"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl, "),
        ("cpo", {"loss_type": "ipo2"}, "loss_type must be one of sigmoid, "),
        ("simpo", {"loss_type": "sigmoid"}, "no hyper-parameter loss_type"),
        ("grpo", {"importance_sampling_level": "batch"}, "must be one of token, sequence"),
        ("ppo", {"loss_agg_mode": "mean"}, "loss_agg_mode must be one of token-mean, "),
        ("ppo", {"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3"),
        ("aot", {"use_weighting": True}, "takes them apart"),
        ("sft", {"use_weighting": True}, "no hyper-parameter use_weighting"),
        ("sigmoid", {"loss_weights": [1.0]}, "got one name"),
        (["sigmoid", "dpo"], {}, "unknown loss 'dpo'"),
        (["sigmoid", "sft"], {"loss_weights": [1.0]}, "got 1 for 2"),
        (["sigmoid", "sft"], {"loss_weights": [1.0, float("nan")]}, "must be finite"),
        (["sigmoid", "sft"], {"epsilon": 0.1}, "none of the losses sft, sigmoid has no hyper-parameter epsilon"),
        ([], {}, "a list of names that is not empty"),
    ],
)
def test_hyperparameters_are_words_that_a_loss_knows(name, bad, message):
    with pytest.raises(ValueError, match=message):
        losses.create(name, **bad)


def test_a_list_is_the_weighted_sum_of_its_losses():
    mixed = losses.create(["sigmoid", "apo_zero", "sft"], loss_weights=[0.5, 2.0, 0.1], beta=0.3)
    stats, batch, _ = make_batch(mixed, LENGTHS)
    parts = [losses.create("sigmoid", beta=0.3), losses.create("apo_zero", beta=0.3), losses.create("sft", paired=True)]
    found = [coefficients(part, stats, batch) for part in parts]
    value, triple = coefficients(mixed, stats, batch)
    torch.testing.assert_close(value, 0.5 * found[0][0] + 2.0 * found[1][0] + 0.1 * found[2][0])
    torch.testing.assert_close(triple.logp, sum(w * f[1].logp for w, f in zip((0.5, 2.0, 0.1), found, strict=True)))
    assert mixed.name == "sigmoid+apo_zero+sft" and mixed.horizon == "pair"


@pytest.mark.parametrize("name", losses.names())
def test_a_loss_of_tokens_weighs_tokens(name):
    """A chunk of single tokens holds no sequence whose weight could be asked for."""
    loss = losses.create(name)
    assert not (loss.horizon == "token" and loss.weighs_sequences)


@cases
def test_terms_without_a_side_are_declared(case):
    loss = create(case)
    stats, batch, _ = make_batch(loss, LENGTHS)
    for _, part in loss.parts:
        assert part.has_unsided_terms == bool(set(part(stats, batch)) - part.sided)
