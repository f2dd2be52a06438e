"""docs/study.md says of each claim what the committed numbers say."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from fused_po.study.claims import Curves, judge
from fused_po.study.paper import CLAIMS, CONFIRMATORY
from fused_po.study.report import in_words
from fused_po.study.run import Point, Results
from fused_po.study.settings import Settings
from scripts import make_study_doc

DOCS = Path(__file__).resolve().parent.parent / "docs"


def table() -> list[dict[str, str]]:
    with (DOCS / "study" / "claims.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_verdicts_are_those_of_the_numbers() -> None:
    rows = [row for row in table() if row.get("kind") != "exploratory"]
    items = [" ".join(one.split()) for one in (DOCS / "study.md").read_text(encoding="utf-8").split("\n- ")]
    stated = [one for one in items if re.match(r"\*\*[a-z ]+\*\*: ", one)]
    assert len(stated) == len(rows) > 0
    for row in rows:
        (item,) = [one for one in stated if one.startswith(f"**{row['verdict']}**: {row['claim']}")]
        assert f"(study/plots/{row['figure']}.png)" in item
        assert (DOCS / "study" / "plots" / f"{row['figure']}.png").is_file()


def test_the_numbers_are_of_the_claims_that_are_tested() -> None:
    assert [row["claim"] for row in table()] == [claim.text for claim in CLAIMS]


def test_the_page_is_made_of_a_study(tmp_path: Path) -> None:
    study, docs = tmp_path / "study", tmp_path / "docs"
    (study / "plots").mkdir(parents=True)
    docs.mkdir()
    shutil.copy(DOCS / "study.md", docs)
    for name in ("report.md", "claims.csv", "plots/g.png"):
        (study / name).write_text(name)
    points = [
        Point(seed, "dpo", arm, step, "reward/held_out", 0.1 * seed + step * (arm == "full") + 0.01 * step * seed)
        for seed in range(20)
        for arm in ("full", "no positive")
        for step in (0, 1, 2)
    ]
    words = in_words(judge(Curves(Results(points)), CLAIMS), "study/plots", {7: "the loss is nan"})
    assert "**Seed 7 failed** and is left out: the loss is nan" in words
    assert "## Supported" in words and "## Not measured" in words and "## Looked at besides" in words
    assert max(map(len, words.splitlines())) <= 200
    (study / "verdicts.md").write_text(words)
    make_study_doc.main(study, docs)
    page = (docs / "study.md").read_text()
    assert words in page and page.startswith("# What") and "## How far this goes" in page
    # what the words around it count
    assert "Twelve claims" in page and len(CONFIRMATORY) == 12
    assert Settings().ppo_lr == pytest.approx(3 * Settings().dpo_lr) and "three times DPO's" in page
    assert CLAIMS[len(CONFIRMATORY)].text == "PPO's steps lead towards its final answers."
    for claim in CONFIRMATORY:
        assert claim.text in " ".join(page.split())
    assert {one.name for one in (docs / "study").iterdir()} == {"plots", "report.md", "claims.csv"}
    # by hand, and kept the next time
    (docs / "study.md").write_text(page.replace("## How far", "Seen by hand.\n\n## How far"))
    (study / "verdicts.md").write_text("- **supported**: another\n")
    make_study_doc.main(study, docs)
    page = (docs / "study.md").read_text()
    assert "Seen by hand." in page and "another" in page and words not in page
    (study / "verdicts.md").write_text("- **smoke run**: nothing\n")
    with pytest.raises(SystemExit, match="is a smoke run"):
        make_study_doc.main(study, docs)
