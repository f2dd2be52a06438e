"""docs/losses.md is what the registry says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fused_po import losses

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import make_losses_doc  # noqa: E402


def test_page_is_up_to_date():
    assert (ROOT / "docs/losses.md").read_text() == make_losses_doc.table(), "run python scripts/make_losses_doc.py"


def test_losses_that_share_a_surrogate_are_told_apart_by_their_normaliser():
    surrogates = {
        name: make_losses_doc.normaliser(losses.create(name)) for name in ("grpo", "luspo", "dr_grpo", "bnpo", "dapo")
    }
    assert len(set(surrogates.values())) == len(surrogates)
    assert surrogates["grpo"] == "mean over sequences of their token means"
    assert surrogates["luspo"] == "mean over sequences of their token sums"
    assert "max_completion_length" in surrogates["dr_grpo"]
    assert "num_items" in surrogates["dapo"] and "the call's" in surrogates["bnpo"]
    verl = losses.create("ppo", loss_agg_mode="seq-mean-token-mean")
    assert make_losses_doc.normaliser(verl) == surrogates["grpo"]


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_has_equation_source_and_plot(name):
    loss = losses.create(name)
    equation = make_losses_doc.equation(loss)
    assert re.search("log|\u03c3|max|min|\u00b2|</sub>", equation)
    # typeset, nothing left of how docstrings write it; names of classes and arguments are no formulas
    assert not re.search(r"sigmoid|beta\b|epsilon|\bpi\b|stopgrad|\^|`[^`]*Trainer", equation)
    *_, last = equation.split("<br>")
    assert re.fullmatch(r"\*(mean|sum) over .+\*", last)
    assert "arxiv.org" in make_losses_doc.paper(loss) or name in ("conservative", "sft")
    assert (ROOT / f"docs/losses/{name}.png").stat().st_size > 1000
    assert f"**`{name}`**" in make_losses_doc.table()
