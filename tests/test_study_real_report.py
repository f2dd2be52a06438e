"""A study of a pretrained model: what its report is of, what is left out, and what its verdicts are about."""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_po.cli import study_real
from fused_po.study import real_g
from fused_po.study.paper import CONFIRMATORY
from fused_po.study.real_data import read_pairs
from fused_po.study.real_g import NUMBERS
from fused_po.study.real_model import Answer
from fused_po.study.real_pool import Pool, pooled
from fused_po.study.real_report import RECORDED, findings, missing, win_rates, write_real_report
from fused_po.study.real_settings import RealSettings, arms_of
from fused_po.study.run import Point, Results
from fused_po.trainers.data import PreferenceError

STEPS = 4
SETTINGS = RealSettings("model", "pairs.jsonl", steps=STEPS, checkpoints=3, dtype="float32")


def written(folder: Path, seed: int, arm: str, last: int = STEPS, version: str = "1", wins: float = 1.0) -> Path:
    """A run of DPO as a study leaves it, up to the update ``last``."""
    run, draw = folder / f"seed-{seed}" / "dpo" / arm.replace(" ", "-"), random.Random(f"{seed} {arm}")
    run.mkdir(parents=True)
    settings = {name: getattr(SETTINGS, name) for name in SETTINGS.__dataclass_fields__}
    decisive = {"seed": seed, "method": "dpo", "arm": arm, "data": "digest", **SETTINGS.decisive()}
    about = {"decisive": decisive, "version": version, "settings": settings}
    (run / "run.json").write_text(json.dumps(about))
    lines, answers = [], []
    for step in (step for step in SETTINGS.due if step <= last):
        names = RECORDED + (NUMBERS if arm == "full" else ())
        values = {name: step + 0.1 * draw.random() for name in names}
        # falls, more slowly without reweighting, and further in training
        pace = 0.5 if arm == "no reweighting" else 1.0
        values["dpo_loss/train"] = math.log(2) - 0.1 * pace * step
        values["dpo_loss/held_out"] = math.log(2) - 0.05 * pace * step + 0.001 * draw.random()
        lines.append(json.dumps({"seed": seed, "method": "dpo", "arm": arm, "step": step, "values": values}))
        answers += [json.dumps({"step": step, "win": wins}) for _ in range(3)]
    (run / "points.jsonl").write_text("\n".join(lines) + "\n")
    (run / "answers.jsonl").write_text("\n".join(answers) + "\n")
    return run


def study(folder: Path, seeds: int = 3) -> Pool:
    for seed in range(seeds):
        for arm in arms_of("dpo"):
            written(folder, seed, arm)
    return pooled([folder])


def test_runs_that_are_not_finished_are_compared_with_none(tmp_path: Path) -> None:
    study(tmp_path)
    for arm in ("full", "no positive"):
        shutil.rmtree(tmp_path / "seed-1" / "dpo" / arm.replace(" ", "-"))
        written(tmp_path, 1, arm, last=2, wins=0.0)
    pool = pooled([tmp_path])
    assert pool.unfinished == {(1, "dpo", "full"): 2, (1, "dpo", "no positive"): 2}
    assert not [one for one in pool.finished().points if one.seed == 1 and one.arm in ("full", "no positive")]
    # the answers after update 2 are no final ones
    assert win_rates(pool)["dpo", "full"][0] == 1.0 and set(pool.wins["dpo", "full"]) == {0, 2}
    words = missing(pool)
    assert any("seed 1 DPO full (update 2 of 4), seed 1 DPO no positive (update 2 of 4)" in one for one in words)
    assert any("dpo full 2, dpo no negative 3" in one for one in words)
    # a claim about them has no number in that seed, one about others has
    by_number = {one.claim.number: one for one in findings(pool)}
    assert {one.verdict for one in by_number.values() if one.claim.confirmatory} == {"not measured"}
    write_real_report(pool, tmp_path / "report", "fused-po study")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**Not finished**" in text and "undefined in 1 of 3 seeds" in text


def test_g_that_is_not_there_yet_leaves_a_run_unfinished(tmp_path: Path) -> None:
    study(tmp_path, 1)
    path = tmp_path / "seed-0" / "dpo" / "full" / "points.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name in NUMBERS:
        del lines[-1]["values"][name]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(pooled([tmp_path]).unfinished) == {(0, "dpo", "full")}


def test_claims_are_chosen_by_what_is_measured_and_not_by_what_came_out(tmp_path: Path) -> None:
    pool = study(tmp_path)
    found = findings(pool)
    tested = [one for one in found if one.claim.confirmatory]
    # of DPO alone, without a reward
    assert len(tested) == 4 < len(CONFIRMATORY)
    assert not [one for one in tested if "PPO" in one.claim.text or "reward, " in one.claim.number]
    assert {one.verdict for one in tested} <= {"supported", "contradicted", "not shown"}
    # a number that is missing in one seed: the claim stays, and counts among those that p is corrected for
    points = [
        replace(one, value=math.nan) if (one.seed, one.metric) == (2, "kl/held_out") else one
        for one in pool.results.points
    ]
    again = findings(replace(pool, results=Results(points)))
    assert [one.claim for one in again] == [one.claim for one in found]
    for before, after in zip(found, again, strict=True):
        if "KL to the start" in after.claim.number:
            assert after.verdict == "not measured"
        elif before.claim.confirmatory:
            assert after.p == before.p and after.p_holm >= before.p_holm * (1 - 1e-9)
    # with a reward more can be measured
    rewarded = [
        Point(one.seed, "dpo", one.arm, one.step, "reward/held_out", one.value)
        for one in pool.results.points
        if one.metric == "accuracy/held_out"
    ]
    more = replace(pool, results=Results([*pool.results.points, *rewarded]), settings=pool.settings | {"reward": "a:b"})
    assert len(findings(more)) > len(found)


def test_the_report_says_what_its_seeds_can_find(tmp_path: Path) -> None:
    write_real_report(study(tmp_path), tmp_path / "report", "fused-po study")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Seeds share the model, the pairs and the held-out prompts" in text
    assert "Power: with 3 seeds" in text and "effect [95 %]" in text


def test_a_number_that_a_seed_lacks_is_no_mean_of_the_others(tmp_path: Path) -> None:
    study(tmp_path)
    path = tmp_path / "seed-1" / "dpo" / "full" / "points.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["values"]["kl/held_out"] = math.nan
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # a seed that did not run the arm at all is another matter, and said above
    shutil.rmtree(tmp_path / "seed-2" / "dpo" / "controlled")
    write_real_report(pooled([tmp_path]), tmp_path / "report", "fused-po study")
    rows = [line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "| DPO |" in line]
    assert ["undefined in 1 of 3 seeds" in row for row in rows] == [True, False, False, False, False]
    assert "nan" not in "".join(rows)


def test_runs_of_several_versions_are_named(tmp_path: Path) -> None:
    study(tmp_path, 1)
    assert not pooled([tmp_path]).mixed
    written(tmp_path, 1, "full", version="2")
    pool = pooled([tmp_path])
    assert pool.mixed == {"fused_po": ["1", "2"]}
    assert "**Not all runs are alike**: fused_po is 1 or 2." in missing(pool)


@pytest.mark.parametrize("error, words", [(0.001, "by up to 0.1 % of"), (0.3, "by up to 30 % of"), (math.inf, "inf %")])
def test_how_uncertain_g_is_stands_in_the_report(error: float, words: str, tmp_path: Path) -> None:
    pool = study(tmp_path, 1)
    pool.results.points.append(Point(0, "dpo", "full", 2, "G/error", error))
    (said,) = [one for one in missing(pool) if words in one]
    assert ("which is much" in said) == (error > 0.02)


def test_the_command_silences_no_warning_of_g() -> None:
    with warnings.catch_warnings(record=True) as seen:
        study_real._quiet()
        warnings.warn("what libraries say", UserWarning, stacklevel=1)
        for _ in range(2):
            warnings.warn("G along the gradient of D' is uncertain by 30.0 % of", UserWarning, stacklevel=1)
    assert [str(one.message)[:20] for one in seen] == ["G along the gradient"] * 2


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"{index}?", "chosen": "yes", "rejected": "no"} for index in range(6)]
    for name, some in (("a", rows), ("b", [*rows[4:], {**rows[0], "prompt": "new?"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    found = read_pairs(str(tmp_path / "a.jsonl"), 10, str(tmp_path / "b.jsonl"))
    assert {row["prompt"] for row in found.held_out} == {"4?", "5?", "new?"}
    assert {row["prompt"] for row in found.train} == {"0?", "1?", "2?", "3?"}
    with pytest.raises(PreferenceError, match="all its prompts are those of"):
        read_pairs(str(tmp_path / "a.jsonl"), 10, str(tmp_path / "a.jsonl"))


def test_final_answers_are_drawn_by_other_random_numbers_than_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def answers(model: object, speaker: object, rows: list[dict[str, str]], *, sampled: bool = True, seed: int = 0):
        seeds.append(seed)
        return [Answer(row["prompt"], [1], [2], "", row) for row in rows]

    def aligned(*given: object, **options: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(real_g, "load", lambda *given: torch.nn.Linear(1, 1))
    monkeypatch.setattr(real_g, "answers", answers)
    monkeypatch.setattr(real_g, "gradient_alignment", aligned)
    measured = real_g.g_of_run(
        replace(SETTINGS, final="sampled", samples=16),
        3,
        "grpo",
        {0: None},
        known=set(),
        speaker=SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)),  # type: ignore[arg-type]
        pairs=None,
        references=lambda rows: [],
        prompts=[{"prompt": "a"}, {"prompt": "b"}],
        reward=lambda prompts, given, columns: [float(index % 2) for index in range(len(given))],
    )
    with pytest.raises(InterruptedError):
        next(measured)
    assert len(seeds) == 2 and seeds[0] != seeds[1]
