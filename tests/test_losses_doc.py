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


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_has_equation_source_and_plot(name):
    loss = losses.create(name)
    assert re.search(r"log|sigmoid|max|min|\^", make_losses_doc.equation(loss))
    assert "arxiv.org" in make_losses_doc.paper(loss) or name in ("conservative", "sft")
    assert (ROOT / f"docs/losses/{name}.png").stat().st_size > 1000
    assert f"**`{name}`**" in make_losses_doc.table()
