"""``fused-po study``: the task, a whole small study, and how claims are judged."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace

import pytest

from fused_po.cli import main
from fused_po.study.claims import CLAIMS, Claim, Curves, judge
from fused_po.study.figures import FIGURES
from fused_po.study.report import read_results, write_report, write_results
from fused_po.study.run import Point, Results, run_seed, total_updates
from fused_po.study.settings import ARMS, METHODS, QUICK, Settings
from fused_po.study.task import Prompt, all_prompts, demonstration, reward

SMALL = Settings(**{**QUICK, "sft_steps": 100, "steps": 4, "pairs": 8, "checkpoints": 3, "samples": 8})


@pytest.mark.parametrize(
    "answer, right",
    [
        ("14+23", 1.0),
        ("4+33", 1.0),
        ("1+12+24", 1.0),
        ("10+27", 0.0),
        ("14+24", 0.0),
        ("37", 0.0),
        ("4+033", 0.0),
        ("14+23+", 0.0),
        ("", 0.0),
        ("4+33=37", 0.0),
    ],
)
def test_rewards(answer, right):
    assert reward(Prompt(37, 4), answer) == right


def test_demonstrations_are_right_but_for_the_noise():
    train, held_out = all_prompts(30, 0.15, 0)
    assert not set(train) & set(held_out) and len(held_out) == round(0.15 * len(train + held_out))
    draw = random.Random(0)
    assert all(reward(prompt, demonstration(prompt, 0.0, draw)) for prompt in train + held_out for _ in range(3))
    noisy = [reward(draw.choice(train), "") + reward(p, demonstration(p, 0.5, draw)) for p in train for _ in range(10)]
    assert 0.45 < sum(noisy) / len(noisy) < 0.55


@pytest.fixture(scope="module")
def results():
    counted = []
    found = run_seed(0, SMALL, counted.append)
    assert sum(counted) == total_updates(SMALL)
    return found


def test_all_arms_begin_at_the_same_start(results):
    curves = Curves(results)
    for metric in ("reward/held_out", "entropy/train", "dpo_loss/held_out"):
        assert len({curves.curve(0, m, metric, arm)[0] for m in METHODS for arm in ARMS[m]}) == 1
    for method in METHODS:
        assert curves.curve(0, method, "kl/train")[0] == pytest.approx(0.0, abs=1e-6)
        assert curves.curve(0, method, "drift/chosen")[0] == pytest.approx(0.0, abs=1e-5)
        # and do not stay there
        ends = {curves.curve(0, method, "dpo_loss/held_out", arm)[SMALL.steps] for arm in ARMS[method]}
        assert len(ends) == len(ARMS[method])


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_g_sum_to_the_whole(results, method):
    curves = Curves(results)
    for suffix in ("", "/no_reweighting"):
        g = {part: curves.curve(0, method, f"G/{part}{suffix}") for part in ("whole", "positive", "negative", "rest")}
        thirds = [curves.curve(0, method, f"G/{third}{suffix}") for third in ("top", "middle", "bottom")]
        assert list(g["whole"]) == [0, 2, 4]
        for step, whole in g["whole"].items():
            scale = 1e-4 * sum(abs(g[side][step]) for side in ("positive", "negative")) + 1e-6
            assert g["positive"][step] + g["negative"][step] == pytest.approx(whole, abs=scale)
            assert sum(third[step] for third in thirds) == pytest.approx(whole, abs=scale)
            assert g["rest"][step] == 0.0


def test_a_seed_repeats_itself(results):
    again = run_seed(0, SMALL)
    assert [p for p in again.points if p.method == "dpo"] == [p for p in results.points if p.method == "dpo"]
    assert again.bins == results.bins


def test_grpo_instead_of_ppo():
    settings = replace(SMALL, policy_loss="grpo", generations=4, estimator="directional")
    curves = Curves(run_seed(1, settings))
    # a group of equal rewards has no gradient; here some groups differ
    assert any(value != 0.0 for value in curves.curve(1, "ppo", "G/whole").values())


def test_results_survive_their_files(results, tmp_path):
    write_results(results, tmp_path)
    assert read_results(tmp_path) == results


def test_the_report_holds_every_claim_with_its_plot(results, tmp_path):
    findings = write_report(results, SMALL, tmp_path, "fused-po study", 60.0)
    page, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert page.count("<svg") == len(FIGURES)
    for one in findings:
        assert one.verdict == "too few seeds"
        assert f'href="#{one.claim.figure}"' in page
        assert (tmp_path / "plots" / f"{one.claim.figure}.svg").is_file()
    # a table row has the same number of cells whatever a claim says
    rows = [line for line in text.splitlines() if line.startswith("|") and "too few seeds" in line]
    assert len(rows) == len(CLAIMS) and {line.replace("\\|", "").count("|") for line in rows} == {6}
    with (tmp_path / "claims.csv").open(encoding="utf-8") as file:
        assert [row["claim"] for row in csv.DictReader(file)] == [claim.text for claim in CLAIMS]


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([1.0, 1.1, 0.9], "supported"),
        ([-1.0, -1.1, -0.9], "contradicted"),
        ([1.0, 1.0, -0.1], "not shown"),
        ([0.1, 5.0, 0.1], "not shown"),
        ([0.0, 0.0, 0.0], "not shown"),
        ([1.0, 1.1], "too few seeds"),
        ([1.0], "too few seeds"),
    ],
)
def test_verdicts(values, verdict):
    points = [Point(seed, "dpo", "full", 0, "number", value) for seed, value in enumerate(values)]
    claim = Claim("text", "source", "number", "g", lambda curves, seed: curves.curve(seed, "dpo", "number")[0])
    found = judge(Curves(Results(points)), [claim])[0]
    assert found.verdict == verdict
    assert found.mean == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoints": 1}, "checkpoints must be at least 2"),
        ({"steps": 3, "checkpoints": 5}, "checkpoints must be at most steps"),
        ({"noise": 1.0}, r"noise must lie in \[0, 1\)"),
        ({"hidden_size": 40}, "hidden_size must be a multiple of 32"),
        ({"batch": 6}, "batch must be even and a multiple of generations"),
        ({"policy_loss": "a2c"}, "policy_loss must be one of"),
        ({"dpo_lr": float("nan")}, "dpo_lr must be positive"),
        ({"policy_loss": "grpo", "generations": 1}, "generations must be at least 2"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_a_start_that_learns_nothing_is_said_so():
    with pytest.raises(ValueError, match="the start answers too well or too badly"):
        run_seed(0, replace(SMALL, sft_steps=1))


def test_the_command(tmp_path, capsys):
    small = [
        f"--{name.replace('_', '-')}={getattr(SMALL, name)}" for name in ("sft_steps", "steps", "pairs", "samples")
    ]
    output = tmp_path / "study"
    arguments = ["study", "--quick", *small, "--checkpoints=3", "--seeds=2", "--workers=2", f"--output={output}"]
    assert main(arguments) == 0
    assert "too few seeds: DPO follows stable targets" in capsys.readouterr().out
    found = read_results(output)
    assert {point.seed for point in found.points} == {0, 1}
    assert json.loads((output / "settings.json").read_text())["steps"] == 4
    assert "fused-po study --seeds 2 --quick" in (output / "report.md").read_text(encoding="utf-8")
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds=0", "--steps=-1", "--dpo-lr=nan", "--policy-loss=a2c"])
def test_bad_arguments(option, tmp_path):
    with pytest.raises(SystemExit):
        main(["study", option, f"--output={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()
