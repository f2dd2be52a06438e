"""Rows whose coefficients are known to be 0 before the policy runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_po import splits
from fused_po.ops.coefficients import coefficients, silent_rows
from tests.losses.cases import CASES, create, make_batch

LENGTHS = [5, 1, 3, 2, 4, 6]
cases = pytest.mark.parametrize("case", CASES)
SPLITS = [None, splits.positive_only(), splits.negative_only(), splits.Split(negative=0.0, by="direction")]


@cases
@pytest.mark.parametrize("split", SPLITS, ids=["whole", "positive", "negative", "direction"])
def test_silent_rows_have_no_coefficient(case, split):
    """Whatever the statistics say, also where single tokens of a sequence have no advantage."""
    loss = create(case)
    for seed in range(4):
        stats, batch, _ = make_batch(loss, LENGTHS, seed=seed)
        batch = _with_zeros(batch, seed)
        silent = silent_rows(loss, batch, split)
        if silent is not None:
            _, triple = coefficients(loss, stats, batch, split)
            for c in triple:
                assert c is None or (c[silent] == 0).all()


def _with_zeros(batch, seed):
    """Every factor of a policy loss is 0 for one sequence, and for single tokens."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    # a set's order changes with the hash seed of the process, and the draws with it
    for name in sorted(batch.per_token.keys() & {"advantage", "importance_weight", "row_weight"}):
        kept = batch.spread(torch.rand(len(LENGTHS), generator=generator) < 0.85)
        kept = kept & (torch.rand(kept.shape, generator=generator) < 0.9)
        changed[name] = torch.where(kept, batch.per_token[name], 0.0)
    return replace(
        batch,
        per_token={**batch.per_token, **changed},
        per_sequence={name: v for name, v in batch.per_sequence.items() if name not in changed},
    )


@pytest.mark.parametrize(
    ("case", "split", "want"),
    [
        ("dapo", None, "advantage"),
        ("gspo", None, "sequence"),
        ("psr", None, "not positive"),
        ("nsr", None, "not negative"),
        ("asymre", None, "weights"),
        ("sigmoid", splits.positive_only(), "rejected"),
        ("sigmoid", splits.negative_only(), "chosen"),
        # terms without a side keep their gradient, and c may be anything whose sign is not known
        ("cpo", splits.positive_only(), "none"),
        ("orpo", splits.positive_only(), "none"),
        ("dapo-all", None, "none"),
        ("sigmoid", splits.Split(negative=0.0, by="direction"), "none"),
        ("kto", splits.positive_only(), "undesirable"),
    ],
)
def test_which_rows_are_silent(case, split, want):
    loss = create(case)
    _, batch, _ = make_batch(loss, LENGTHS)
    if "advantage" in batch.per_token:
        batch = _with_zeros(batch, 4)
        weightless = (batch.per_token["row_weight"] == 0) | (batch.per_token["importance_weight"] == 0)
        zero = weightless | (batch.per_token["advantage"] == 0)
        assert 0 < int(weightless.sum()) < int(zero.sum()) < zero.numel()
    found = silent_rows(loss, batch, split)
    if want == "none":
        assert found is None
        return
    wanted = {
        "rejected": lambda: ~batch.chosen,
        "chosen": lambda: batch.chosen,
        "undesirable": lambda: ~batch.spread(batch.per_sequence["desirable"]),
        "advantage": lambda: zero,
        "weights": lambda: weightless,
        "not positive": lambda: zero | (batch.per_token["advantage"] <= 0),
        "not negative": lambda: zero | (batch.per_token["advantage"] >= 0),
        "sequence": lambda: torch.stack(
            [
                batch.spread(batch.sum_per_sequence(batch.per_token[name] != 0) == 0)
                for name in ("advantage", "row_weight", "importance_weight")
            ]
        ).any(0),
    }
    assert torch.equal(found, wanted[want]())
