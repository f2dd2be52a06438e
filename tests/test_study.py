"""``fused-po study``: the task, a whole small study, its report and its command."""

from __future__ import annotations

import csv
import html
import math
import random
import re
from dataclasses import replace

import pytest
import torch

from fused_po.study import learners, run
from fused_po.study.claims import Curves
from fused_po.study.figures import FIGURES
from fused_po.study.moment import POSITIONS, SIDES, THIRDS
from fused_po.study.page import Page
from fused_po.study.paper import CLAIMS, CONFIRMATORY
from fused_po.study.policy import Language, new_model, sample, tiny_tokenizer
from fused_po.study.report import read_results, result, write_report, write_results
from fused_po.study.run import Results, run_seed
from fused_po.study.settings import ARMS, FIRST_SEED, METHODS, SEEDS, TUNED, Settings
from fused_po.study.small import about
from fused_po.study.task import Prompt, all_prompts, demonstration, paraphrase, reward
from tests.small_study import SMALL, small_results


def curve(curves: Curves, seed: int, method: str, metric: str, arm: str = "full") -> dict[int, float]:
    """step -> value of one seed."""
    row = curves.array(method, metric, arm)[curves.seeds.index(seed)]
    return dict(zip(curves.steps(method, metric, arm), row.tolist(), strict=True))


@pytest.fixture
def results():
    return small_results()


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


def test_paraphrases_are_as_right_and_go_both_ways():
    assert paraphrase("14+23") == "23+14" and paraphrase("1+12+24") == "24+12+1" and paraphrase("37") == "37"
    draw, prompt = random.Random(1), Prompt(28, 4)
    for _ in range(50):
        answer = demonstration(prompt, 0.5, draw)
        assert reward(prompt, paraphrase(answer)) == reward(prompt, answer) and paraphrase(paraphrase(answer)) == answer


def test_demonstrations_are_right_but_for_the_noise():
    train, held_out = all_prompts(30, 0.15, 0)
    assert not set(train) & set(held_out) and len(held_out) == round(0.15 * len(train + held_out))
    draw = random.Random(0)
    assert all(reward(prompt, demonstration(prompt, 0.0, draw)) for prompt in train + held_out for _ in range(3))
    noisy = [reward(draw.choice(train), "") + reward(p, demonstration(p, 0.5, draw)) for p in train for _ in range(10)]
    assert 0.45 < sum(noisy) / len(noisy) < 0.55


def test_all_arms_begin_at_the_same_start(results):
    curves = Curves(results)
    for metric in ("reward/held_out", "entropy/train", "dpo_loss/held_out"):
        assert len({curve(curves, 0, m, metric, arm)[0] for m in METHODS for arm in ARMS[m]}) == 1
    for method in METHODS:
        first = {
            name: curve(curves, 0, method, name, "no negative")[0] for name in curves.metrics(method, "no negative")
        }
        assert first["kl/train"] == pytest.approx(0.0, abs=1e-6)
        assert first["drift/chosen"] == pytest.approx(0.0, abs=1e-5) == first["drift/rejected/reworded"]
        assert first["accuracy/held_out"] == 0.5 and first["margin/train"] == pytest.approx(0.0, abs=1e-6)
        # and do not stay there; the penalty is 0 in the first rollout, of four updates
        ends = {curve(curves, 0, method, "dpo_loss/held_out", arm)[SMALL.steps] for arm in ARMS[method]}
        assert len(ends) == len(ARMS[method])


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_g_sum_to_the_whole(results, method):
    curves = Curves(results)
    whole = curve(curves, 0, method, "G")
    assert list(whole) == list(SMALL.measured) == [0, 2, 4, 6, 8]
    for step, value in whole.items():
        at = {
            name: curve(curves, 0, method, name)[step]
            for name in curves.metrics(method)
            if step or "successive" not in name
        }
        sides = [at[f"G/{side}"] for side in SIDES]
        scale = 1e-4 * sum(map(abs, sides)) + 1e-6
        assert sum(sides) == pytest.approx(value, abs=scale)
        assert (at["G/sampled"] + at["G/greedy"]) / 2 == pytest.approx(value)
        assert sum(at[f"cosine/{side}"] for side in SIDES) == pytest.approx(at["cosine"], abs=1e-4)
        final = [at[f"G/final {index}"] for index in range(SMALL.final_draws)]
        assert sum(final) / len(final) == pytest.approx(at["G/sampled"], abs=scale)
        draws = [value for name, value in at.items() if name.startswith("G/draw ")]
        assert len(draws) == (1 if method == "dpo" else SMALL.draws)
        assert sum(draws) / len(draws) == pytest.approx(value, abs=scale)
        for side in SIDES:
            thirds = [at[f"G/{side}/{third}"] for third in THIRDS]
            cells = [at[f"table/{side}/{third}/{place}"] for third in THIRDS for place in POSITIONS]
            if method == "dpo" and not step:
                # all pairs weigh the same there
                assert all(map(math.isnan, thirds + cells))
            if not math.isnan(sum(thirds)):
                assert sum(thirds) == pytest.approx(at[f"G/{side}"], abs=scale)
                assert sum(cells) == pytest.approx(at[f"G/{side}"], abs=scale)
        assert at[f"time/{step}"] <= 1.0


def test_greedy_answers_repeat():
    language = Language(tiny_tokenizer())
    model = new_model(language.tokenizer, 32, 1, 0)
    prompts, _ = all_prompts(14, 0.15, 0)
    one, other = ([answer.ids for answer in sample(model, language, prompts, 14, greedy=True)] for _ in range(2))
    assert one == other and one != [answer.ids for answer in sample(model, language, prompts, 14)]


@pytest.mark.parametrize("method", METHODS)
def test_an_arm_that_is_probed_goes_as_one_that_is_not(method, monkeypatch):
    monkeypatch.setattr(run, "ARMS", {method: {"full": ARMS[method]["full"], "again": ARMS[method]["full"]}})
    monkeypatch.setattr(run, "METHODS", (method,))
    points = run_seed(0, SMALL).points
    first, second = ({(p.step, p.metric): p.value for p in points if p.arm == arm} for arm in ("full", "again"))
    assert len(second) > 50
    assert {key: first[key] for key in second} == second


def test_a_penalty_keeps_the_policy_at_its_start(monkeypatch):
    arms = {"full": ARMS["ppo"]["full"], "KL penalty": replace(ARMS["ppo"]["KL penalty"], kl=2.0)}
    monkeypatch.setattr(run, "ARMS", {"ppo": arms})
    monkeypatch.setattr(run, "METHODS", ("ppo",))
    for loss in ("ppo", "grpo"):
        settings = replace(SMALL, policy_loss=loss, steps=24, checkpoints=5, ppo_lr=3e-3)
        curves = Curves(run_seed(0, settings))
        free, held = (curve(curves, 0, "ppo", "kl/train", arm)[24] for arm in arms)
        assert held < 0.7 * free


def test_a_seed_repeats_itself(results):
    again = run_seed(0, SMALL)
    # as text, where NaN equals itself
    assert list(map(repr, again.points)) == list(map(repr, results.points))
    assert again.bins == results.bins


def test_coefficients_keep_their_sign(results):
    for method, steps in (("dpo", (0, 8)), ("ppo", (0, 8))):
        for step in steps:
            for side, sign in SIDES.items():
                bars = [b for b in results.bins if (b.method, b.step, b.side) == (method, step, side)]
                assert sum(bar.count for bar in bars) > 0
                # a bar around 0 may hold the smallest
                assert all(sign * (bar.left + bar.right) >= -1e-9 for bar in bars if bar.count)


def test_grpo_instead_of_ppo():
    settings = replace(SMALL, policy_loss="grpo", generations=4)
    curves = Curves(run_seed(1, settings))
    # a group of equal rewards has no gradient; here some groups differ
    assert any(value != 0.0 for value in curve(curves, 1, "ppo", "G").values())


def _written(results, folder, seeds=1, settings=SMALL, **options):
    many = Results([replace(point, seed=seed) for seed in range(seeds) for point in results.points], results.bins)
    return write_report(many, about(settings, list(range(seeds)), "fused-po study", 60.0, **options), folder)


def test_a_study_without_any_advantage_has_its_report(monkeypatch, tmp_path, unpainted):
    monkeypatch.setattr(learners.advantages, "group_relative", lambda rewards, **options: torch.zeros_like(rewards))
    settings = replace(SMALL, policy_loss="grpo", generations=4)
    findings = {f.claim.text: f for f in _written(run_seed(0, settings), tmp_path, 3, settings)}
    for start in ("PPO's targets move", "They do so less in PPO"):
        (found,) = [finding for text, finding in findings.items() if text.startswith(start)]
        assert found.verdict == "not measured" and found.text == "undefined in 3 of 3 seeds"
    # what needs no advantage is judged; three equal seeds leave no error, and a sign says little
    (found,) = [one for text, one in findings.items() if text.startswith("DPO's reweighting holds")]
    assert found.verdict == "not shown" and found.p == 0.25
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("undefined in 3 of 3 seeds") >= 2 and "nan" not in text
    assert "it is GRPO here" in text


def test_results_survive_their_files(results, tmp_path):
    write_results(results, tmp_path)
    again = read_results(tmp_path)
    assert list(map(repr, again.points)) == list(map(repr, results.points)) and again.bins == results.bins


def test_the_report_holds_every_claim_with_its_plot(results, tmp_path):
    findings = _written(results, tmp_path)
    page, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert page.count("<svg") == len(FIGURES) + 1 == text.count("](plots/")
    for one in findings:
        assert one.verdict in ("too few seeds", "not measured", "exploratory")
        assert one.claim.text in text and (tmp_path / "plots" / f"{one.claim.figure}.png").is_file()
    for picture in (tmp_path / "plots").iterdir():
        assert picture.stat().st_size <= 60_000, picture.name
    # links lead to headings, rows have as many cells as their heads
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    assert set(re.findall(r"\(#([^)]*)\)", text)) <= headings
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(re.findall(r'id="([^"]*)"', page))
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")]
    assert set(cells) == {9, 7, 12}
    # what one says, the other says; how words are set apart is theirs
    words = html.unescape(re.sub(r"<svg.*?</svg>|<style>.*?</style>|<[^>]*>", "", page, flags=re.S))
    words = "".join(words.split())
    for line in text.splitlines():
        for cell in re.split(r"(?<!\\)\|", line) if line and not line.startswith(("!", "|--")) else ():
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell.strip().removeprefix("- ").lstrip("#"))
            assert "".join(re.sub(r"\*\*|`|\\", "", plain).split()) in words, plain
    with (tmp_path / "claims.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["claim"] for row in rows] == [claim.text for claim in CLAIMS]
    assert [row["kind"] for row in rows].count("confirmatory") == len(CONFIRMATORY)


def test_what_seeds_a_report_is_of(results, tmp_path, unpainted):
    findings = _written(results, tmp_path, seeds=3)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert result(findings, 3) in text and "Power: with 3 seeds" in text
    assert f"Seeds below {TUNED} chose settings" in text and "0 to 2" in text
    assert FIRST_SEED >= TUNED and SEEDS >= 19
    _written(results, tmp_path, seeds=3, smoke=True)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "A smoke run" in text.splitlines()[2] and "Power" not in text
    assert "**supported**" not in text and "**contradicted**" not in text


def test_a_page_says_the_same_twice():
    page = Page("A & B")
    page.say("**one** `x|y` [two](#three) < 3")
    page.table(["h"], [["a|b"]])
    assert page.markdown == "# A & B\n\n**one** `x|y` [two](#three) < 3\n\n| h |\n|---|\n| a\\|b |\n"
    assert '<p><b>one</b> <code>x|y</code> <a href="#three">two</a> &lt; 3</p>' in page.html
    assert "<td>a|b</td>" in page.html and "<title>A &amp; B</title>" in page.html


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoints": 4}, "checkpoints must be at least 5"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"samples": 3}, "samples must be at least 4"),
        ({"final_draws": 1}, "final_draws must be at least 2"),
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
