"""docs/study.md says of each claim what the committed numbers say."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from fused_po.study.claims import CLAIMS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_verdicts_are_those_of_the_numbers() -> None:
    with (DOCS / "study" / "claims.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["claim"] for row in rows] == [claim.text for claim in CLAIMS]
    text = " ".join((DOCS / "study.md").read_text(encoding="utf-8").split())
    stated = re.findall(r"- \*\*([a-z ]+)\*\*: ", text)
    assert len(stated) == len(rows)
    for row in rows:
        assert f"- **{row['verdict']}**: {row['claim']}" in text, row["claim"]
        assert (DOCS / "study" / "plots" / f"{row['figure']}.png").is_file()


def test_every_claim_links_its_plot() -> None:
    items = (DOCS / "study.md").read_text(encoding="utf-8").split("\n- **")[1:]
    for claim in CLAIMS:
        (item,) = [" ".join(one.split()) for one in items if claim.text in " ".join(one.split())]
        assert f"(study/plots/{claim.figure}.png)" in item
