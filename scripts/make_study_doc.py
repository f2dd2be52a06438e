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

PAGE = f"""\
# What the small study says to the paper's claims

`fused-po study` trains DPO and PPO from the same supervised start on a task whose answers can be checked, and watches
each by G (arXiv 2512.00778; the README says what G is). This page says in plain words what came out with the default
settings on seeds that had chosen nothing. **It is a study of very small models**: what it supports is possible, not
general; what it does not show may well hold elsewhere.

Twelve claims were fixed before the runs, each with one number a seed. A verdict stands where Student's t test,
corrected for all twelve by Holm's procedure, says at 5 % that the mean over seeds is not 0. Effect sizes are means over
the standard deviation of single seeds; brackets are intervals at 95 %, of each number for itself. [The
report](study/report.md) has all plots, the settings, and how large an effect had to be to be found;
[claims.csv](study/claims.csv) has the numbers of every seed.

{BEGIN}
{END}

## How far this goes

- One task, one model size, one learning rate for each method, chosen so that both learn without collapse; neither was
  tuned to a claim. Settings and schedules were chosen on seeds below 200, the seeds here are others.
- D' are answers of each run's own final model, sampled several times and greedy, and the numbers are means of both
  kinds. At the final model itself a sampled D' has a G of about 0 by construction.
- PPO's D are fresh rollouts at each checkpoint. The ratio to the sampling policy is 1 there, so the clip does nothing
  in G. PPO has no penalty on the KL to its start, but in the arm of that name.
- That steps lead towards where a run ends, on average, is true of most runs that get anywhere: what the first claim
  says of DPO, the first line of what is looked at besides says of PPO.
- How far successive updates agree depends on how far a policy moves between two checkpoints, so on learning rates
  (PPO's is three times DPO's) and not on the method alone.
- G itself has no normaliser: as gradients grow, so does it. What compares methods or times is the cosine.
- Thirds by weight are thirds within a side: over both sides they would mostly tell the sides apart.
- What is looked at besides the twelve claims is exploratory: of twenty numbers about nothing, one
  interval leaves 0 out.
"""


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
    text = page.read_text(encoding="utf-8") if page.exists() else PAGE
    if BEGIN not in text:
        text = PAGE
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{verdicts}\n{END}{after}", encoding="utf-8")
    for path in target.rglob("*"):
        if path.is_file() and path.stat().st_size > LARGEST:
            raise SystemExit(f"{path} is larger than {LARGEST} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
