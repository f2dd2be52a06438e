"""Put a study into the documentation: python scripts/make_study_doc.py STUDY.

``docs/study`` gets its report, its table of claims and its plots, ``docs/study.md`` its verdicts between two markers.
What stands around them is written by hand and stays.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- verdicts, by scripts/make_study_doc.py -->", "<!-- end of the verdicts -->"
LARGEST = 100_000


def main(study: Path, docs: Path = DOCS) -> None:
    """Copy what a study wrote, and its verdicts into the page."""
    verdicts = (study / "verdicts.md").read_text(encoding="utf-8")
    if "smoke run" in verdicts:
        raise SystemExit(f"{study} is a smoke run")
    target = docs / "study"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(study / "plots", target / "plots")
    for name in ("report.md", "claims.csv"):
        shutil.copy(study / name, target / name)
    page = docs / "study.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{verdicts}\n{END}{after}", encoding="utf-8")
    for path in target.rglob("*"):
        if path.is_file() and path.stat().st_size > LARGEST:
            raise SystemExit(f"{path} is larger than {LARGEST} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
