"""``fused-po study``: the task, a whole small study, and how claims are judged."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from fused_po.cli import main
from fused_po.cli import study as command
from fused_po.diagnostics import Examples, gradient_alignment
from fused_po.losses import create
from fused_po.study import learners, run
from fused_po.study.claims import CLAIMS, Claim, Curves, judge
from fused_po.study.estimates import fluctuation, mean_and_error, two_sided_p, written
from fused_po.study.figures import FIGURES
from fused_po.study.policy import Language, new_model, tiny_tokenizer
from fused_po.study.report import read_results, write_report, write_results
from fused_po.study.run import Point, Results, run_seed, total_updates
from fused_po.study.settings import ARMS, METHODS, QUICK, Settings
from fused_po.study.task import Prompt, all_prompts, demonstration, reward

SMALL = Settings(**{**QUICK, "sft_steps": 100, "steps": 4, "pairs": 8, "samples": 8})


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
        assert list(g["whole"]) == [0, 1, 2, 3, 4]
        for step, whole in g["whole"].items():
            scale = 1e-4 * sum(abs(g[side][step]) for side in ("positive", "negative")) + 1e-6
            assert g["positive"][step] + g["negative"][step] == pytest.approx(whole, abs=scale)
            assert sum(third[step] for third in thirds) == pytest.approx(whole, abs=scale)
            assert g["rest"][step] == 0.0


def test_g_is_that_of_all_pairs_and_of_every_draw(results):
    curves = Curves(results)
    assert curves.draws(0, "dpo") == ["G/draw 0"] and curves.draws(0, "ppo") == ["G/draw 0", "G/draw 1"]
    first, second = (curves.curve(0, "ppo", f"G/draw {index}") for index in (0, 1))
    assert sum(first[step] != second[step] for step in first) >= 3
    for step, g in curves.curve(0, "ppo", "G").items():
        assert g == pytest.approx((first[step] + second[step]) / 2)
        # by parts it is measured over the first
        assert curves.curve(0, "ppo", "G/whole")[step] == pytest.approx(first[step], rel=1e-4, abs=1e-6)
    # half of the pairs are the probe
    assert curves.curve(0, "dpo", "G") != curves.curve(0, "dpo", "G/whole")


@pytest.mark.parametrize("method", METHODS)
def test_an_arm_that_is_probed_goes_as_one_that_is_not(method, monkeypatch):
    monkeypatch.setattr(run, "ARMS", {method: {"full": None, "again": None}})
    monkeypatch.setattr(run, "METHODS", (method,))
    points = run_seed(0, SMALL).points
    first, second = ({(p.step, p.metric): p.value for p in points if p.arm == arm} for arm in ("full", "again"))
    assert len(second) > 50
    assert {key: first[key] for key in second} == second


def test_a_seed_repeats_itself(results):
    again = run_seed(0, SMALL)
    # as text, where NaN equals itself
    assert list(map(repr, again.points)) == list(map(repr, results.points))
    assert again.bins == results.bins


def test_grpo_instead_of_ppo():
    settings = replace(SMALL, policy_loss="grpo", generations=4, estimator="directional")
    curves = Curves(run_seed(1, settings))
    # a group of equal rewards has no gradient; here some groups differ
    assert any(value != 0.0 for value in curves.curve(1, "ppo", "G/whole").values())


def test_a_study_without_any_advantage_has_its_report(monkeypatch, tmp_path):
    monkeypatch.setattr(learners.advantages, "group_relative", lambda rewards, **options: torch.zeros_like(rewards))
    settings = replace(SMALL, policy_loss="grpo", generations=4)
    one = run_seed(0, settings)
    results = Results([replace(point, seed=seed) for seed in range(3) for point in one.points], one.bins)
    findings = {f.claim.text: f for f in write_report(results, settings, tmp_path, "fused-po study", 60.0)}
    for start in ("PPO follows moving", "They do so less in PPO", "Weighing by |A|"):
        (found,) = [finding for text, finding in findings.items() if text.startswith(start)]
        assert found.verdict == "not measured" and found.text == "undefined in 3 of 3 seeds"
    # what needs no advantage is judged; three equal seeds leave no error
    assert findings["DPO lowers chosen answers too."].verdict in ("supported", "contradicted")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("undefined in 3 of 3 seeds") >= 3 and "nan" not in text
    assert "it is GRPO here" in text


def test_weights_by_luck_tell_no_groups_apart():
    """Random advantages, models and answers: tokens that weigh more have a larger G, which shows nothing."""
    language, points = Language(tiny_tokenizer()), []
    for seed in range(6):
        draw, (prompts, _) = random.Random(seed), all_prompts(14, 0.15, seed)
        model = new_model(language.tokenizer, 32, 1, seed).eval()
        for step in range(6):
            d, target = (
                language.pad([language.written(p, demonstration(p, 0.5, draw)) for p in prompts], torch.device("cpu"))
                for _ in range(2)
            )
            inputs = ({"input_ids": one.input_ids, "attention_mask": one.attention_mask} for one in (d, target))
            given = {"advantage": torch.randn(d.labels.shape)}
            examples = Examples(next(inputs), d.labels, given), Examples(next(inputs), target.labels)
            g = gradient_alignment(model, [examples[0]], create("ppo"), [examples[1]], method="directional")
            points += [Point(seed, "ppo", "full", step, f"G/{part}", g[part]) for part in g.values]
    curves = Curves(Results(points))
    (claim,) = [one for one in CLAIMS if one.text.startswith("Weighing by |A|")]
    assert judge(curves, [claim])[0].verdict == "not shown"
    # with their own weights all seeds would agree
    for seed in curves.seeds:
        top, bottom = (sum(map(abs, curves.on_the_way(seed, "ppo", f"G/{third}"))) for third in ("top", "bottom"))
        assert top > 2 * bottom


def test_results_survive_their_files(results, tmp_path):
    write_results(results, tmp_path)
    again = read_results(tmp_path)
    assert list(map(repr, again.points)) == list(map(repr, results.points)) and again.bins == results.bins


def test_the_report_holds_every_claim_with_its_plot(results, tmp_path):
    findings = write_report(results, SMALL, tmp_path, "fused-po study", 60.0)
    page, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert page.count("<svg") == len(FIGURES)
    undecided = ("too few seeds", "not measured")
    for one in findings:
        assert one.verdict in undecided
        assert f'href="#{one.claim.figure}"' in page
        assert (tmp_path / "plots" / f"{one.claim.figure}.png").is_file()
    # a table row has the same number of cells whatever a claim says
    rows = [
        line for line in text.splitlines() if line.startswith("|") and any(f"**{one}**" in line for one in undecided)
    ]
    assert len(rows) == len(CLAIMS) and {line.replace("\\|", "").count("|") for line in rows} == {7}
    assert f"**{len(CLAIMS)} claims are tested**" in text and f"{0.05 * len(CLAIMS):.2g} verdicts" in text
    with (tmp_path / "claims.csv").open(encoding="utf-8") as file:
        assert [row["claim"] for row in csv.DictReader(file)] == [claim.text for claim in CLAIMS]


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([1.0, 1.1, 0.9], "supported"),
        ([-1.0, -1.1, -0.9], "contradicted"),
        ([1.0, 1.0, -0.1], "not shown"),
        ([0.1, 5.0, 0.1], "not shown"),
        # 2.1 and 3.8 standard errors from 0: for three seeds 4.3 are needed
        ([1.0, 2.0, 5.5], "not shown"),
        ([1.0, 1.5, 2.5], "not shown"),
        ([1.0, 1.5, 2.5, 2.0], "supported"),
        ([1.0, float("nan"), 0.9], "not measured"),
        ([float("nan")], "not measured"),
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
    assert found.mean == pytest.approx(sum(values) / len(values), nan_ok=True)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_one_claim_about_nothing_in_twenty_gets_a_verdict(seeds):
    draw, studies = random.Random(seeds), 4000
    claim = Claim("text", "source", "number", "g", lambda curves, seed: curves.curve(seed, "dpo", "number")[0])
    false = 0
    for _ in range(studies):
        points = [Point(seed, "dpo", "full", 0, "number", draw.gauss(0.0, 1.0)) for seed in range(seeds)]
        false += judge(Curves(Results(points)), [claim])[0].verdict in ("supported", "contradicted")
    # within three standard errors; that all seeds agree asks for more the more there are
    assert false / studies < 0.05 + 3 * (0.05 * 0.95 / studies) ** 0.5
    if seeds == 3:
        assert false / studies > 0.05 - 3 * (0.05 * 0.95 / studies) ** 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoints": 4}, "checkpoints must be at least 5"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"samples": 3}, "samples must be at least 4"),
        ({"largest": 1000}, "largest must be at most 999"),
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
    arguments = ["study", "--quick", *small, "--seeds=2", "--first-seed=3", "--workers=2", f"--output={output}"]
    assert main(arguments) == 0
    assert "too few seeds: DPO follows stable targets" in capsys.readouterr().out
    found = read_results(output)
    assert {point.seed for point in found.points} == {3, 4}
    assert json.loads((output / "settings.json").read_text())["steps"] == 4
    assert "fused-po study --seeds 2 --first-seed 3 --quick" in (output / "report.md").read_text(encoding="utf-8")
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_seeds_that_fail_are_left_out_and_named(results, monkeypatch, tmp_path, capsys):
    failed = FloatingPointError("the loss is nan; a smaller learning rate?")
    monkeypatch.setattr(command, "_seeds", lambda arguments, settings, watch: iter([(1, failed), (0, results)]))
    assert main(["study", "--quick", "--seeds=2", f"--output={tmp_path / 'a'}"]) == 1
    assert "seed 1 failed: the loss is nan" in capsys.readouterr().err
    for name in ("report.md", "report.html"):
        assert "the loss is nan; a smaller learning rate?" in (tmp_path / "a" / name).read_text(encoding="utf-8")
    assert {point.seed for point in read_results(tmp_path / "a").points} == {0}
    # nothing to report
    monkeypatch.setattr(command, "_seeds", lambda arguments, settings, watch: iter([(0, failed)]))
    assert main(["study", "--quick", "--seeds=1", f"--output={tmp_path / 'b'}"]) == 1
    assert not (tmp_path / "b" / "report.md").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device=nowhere"], "device 'nowhere' can't be used"),
        (["--model=./no-such-folder"], "no-such-folder"),
        (["--checkpoints=4"], "checkpoints must be at least 5"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_training(options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "_seeds", lambda *given: pytest.fail("a seed was started"))
    assert main(["study", *options, f"--output={tmp_path / 'x'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("option", ["--seeds=0", "--first-seed=-1", "--steps=-1", "--dpo-lr=nan", "--policy-loss=a2c"])
def test_bad_arguments(option, tmp_path):
    with pytest.raises(SystemExit):
        main(["study", option, f"--output={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "freedom, t", [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (4, 2.77644511), (9, 2.26215716), (30, 2.0422725)]
)
def test_five_percent_of_students_t_lie_beyond_its_quantile(freedom, t):
    values = list(range(freedom + 1))
    middle, (_, error) = freedom / 2, mean_and_error(values)
    assert two_sided_p([value - middle + t * error for value in values]) == pytest.approx(0.05, rel=1e-6)


def test_means_of_what_is_not_defined():
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 3**-0.5))
    assert mean_and_error([2.0]) == pytest.approx((2.0, math.nan), nan_ok=True)
    for values in ([], [1.0, math.nan], [1.0, math.inf]):
        assert all(map(math.isnan, (*mean_and_error(values), two_sided_p(values))))
    assert two_sided_p([0.0, 0.0]) == 1.0 and two_sided_p([1.0, 1.0]) == 0.0
    assert written([1.0, 2.0, 3.0]) == "2 ± 0.58" and written([2.0]) == "2"


def test_fluctuation_is_neither_level_nor_trend_nor_drawing():
    times = list(range(11))
    assert fluctuation(times, [[5.0 - 2.0 * t] for t in times]) == pytest.approx(0.0, abs=1e-12)
    # a curve that is nothing else: a wave around 0
    wave = fluctuation(times, [[(-1.0) ** t] for t in times])
    assert 1.0 <= wave < 1.3
    # and half of each
    assert fluctuation(times, [[1.0 + (-1.0) ** t] for t in times]) == pytest.approx(wave / 2, rel=0.1)
    assert math.isnan(fluctuation(times, [[0.0, 0.0]] * 11))
    draw = random.Random(0)
    found, naive, nothing = [], [], []
    for _ in range(400):
        table = [[1.0 + draw.gauss(0.0, 0.5) for _ in range(4)] for _ in times]
        found.append(fluctuation(times, table))
        naive.append(fluctuation(times, [row[:1] for row in table]))
        nothing.append(fluctuation(times, [[one - 1.0 for one in row] for row in table]))
    mean, error = mean_and_error(found)
    assert abs(mean) < 3 * error < 0.02
    assert mean_and_error(naive)[0] > 0.15
    # draws of nothing have no share to speak of
    assert sum(map(math.isnan, nothing)) > 0.9 * len(nothing)
