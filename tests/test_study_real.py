"""The study on a pretrained model: a tiny one, with a tokenizer of its own, on a few pairs."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fused_po.cli import main
from fused_po.cli.arguments import INTERRUPTED
from fused_po.study import real_run
from fused_po.study.real_g import NUMBERS
from fused_po.study.real_measure import interval
from fused_po.study.real_pool import pooled
from fused_po.study.real_report import RECORDED
from fused_po.study.real_run import measured, points_of
from fused_po.study.real_settings import RealSettings, arms_of
from fused_po.study.real_splits import FlatWeights
from fused_po.trainers.loading import load_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ROWS = [
    {
        "prompt": f"Say {first} and {second}.",
        "chosen": f"{first} {second}",
        "rejected": f"no {second}",
        "wanted": first,
    }
    for first in WORDS
    for second in WORDS[:2]
]
SIZES = {
    "held_out": 4,
    "steps": 4,
    "batch": 8,
    "micro_batch": 4,
    "generations": 4,
    "checkpoints": 3,
    "samples": 6,
    "max_length": 48,
    "max_new_tokens": 6,
}
LOSSES = {"dpo_lr": 0.02, "ppo_lr": 0.02}
REWARD = """
def vowels(prompts, completions, wanted, **columns):
    assert len(prompts) == len(completions) == len(wanted) and "rejected" in columns
    return [sum(map(one.count, "aeiou ")) + 0.01 * len(one) for one in completions]

def longer(prompts, answers, others):
    return [1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0 for a, b in zip(answers, others)]

def wrong(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs and rewards, in which the command runs."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = load_tokenizer("tiny", [text for row in ROWS for text in row.values()])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **tokens))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    (folder / "study_rewards.py").write_text(REWARD, encoding="utf-8")
    return folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    return place


def flags(**options: Any) -> list[str]:
    given = {"model": "model", "data": "pairs.jsonl", **SIZES, **LOSSES, "device": "cpu", **options}
    return ["study", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


@pytest.fixture(scope="module")
def dpo(place: Path) -> Path:
    """All arms of DPO for one seed, with a judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(place))
        assert main([*flags(seeds=1, judge="study_rewards:longer"), "--output", "dpo"]) == 0
    return place / "dpo"


def curves(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for point in points_of(folder):
        found.setdefault(point.metric, {})[point.step] = point.value
    return found


def test_every_arm_of_dpo_starts_alike_and_goes_its_own_way(dpo: Path) -> None:
    arms = {arm: curves(dpo / "seed-0" / "dpo" / arm.replace(" ", "-")) for arm in arms_of("dpo")}
    assert set(arms) == {"full", "no negative", "no positive", "no reweighting", "controlled"}
    names = set(arms["no negative"])
    for found in arms.values():
        assert list(found["dpo_loss/train"]) == [0, 2, 4] and names <= set(found)
        assert found["dpo_loss/held_out"][0] == pytest.approx(math.log(2), abs=1e-6)
        for metric, value in {"accuracy/held_out": 0.5, "win_rate/held_out": 0.5, "kl/held_out": 0.0}.items():
            assert found[metric][0] == pytest.approx(value, abs=1e-5)
        assert all(found[name][0] == arms["full"][name][0] for name in names)
    ends = {arm: found["dpo_loss/train"][4] for arm, found in arms.items()}
    assert len(set(ends.values())) == len(arms)
    assert ends["full"] < math.log(2) - 0.01
    # what is not learned from chosen answers loses them, and the other way round
    assert arms["no positive"]["drift/rejected"][4] < 0 < arms["no negative"]["drift/chosen"][4]


def test_g_is_of_the_full_arm_and_its_sides_sum(dpo: Path) -> None:
    full = curves(dpo / "seed-0" / "dpo" / "full")
    assert list(full["G"]) == [0, 2, 4]
    for step, whole in full["G"].items():
        sides = full["G/positive"][step], full["G/negative"][step]
        assert sum(sides) == pytest.approx(whole, abs=2e-3 * sum(map(abs, sides)))
    # at the start a step on the pairs makes the final answers likelier
    assert full["G"][0] > 0
    assert "G" not in curves(dpo / "seed-0" / "dpo" / "controlled")
    kept = {path.name for path in (dpo / "seed-0" / "dpo" / "full").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4"}
    assert len(list((dpo / "seed-0" / "dpo" / "controlled").glob("checkpoint-*"))) == 1
    # what claims are chosen by is what is recorded
    arm = set(curves(dpo / "seed-0" / "dpo" / "controlled"))
    assert arm == {*RECORDED, "win_rate/held_out"} and set(full) == arm | {*NUMBERS, "G/error"}


def test_answers_are_in_alpaca_evals_format_and_win_rates_have_intervals(dpo: Path) -> None:
    held_out = [json.loads(line)["prompt"] for line in (dpo / "data" / "held_out.jsonl").read_text().splitlines()]
    trained = [json.loads(line)["prompt"] for line in (dpo / "data" / "train.jsonl").read_text().splitlines()]
    assert len(held_out) == 4 and not set(held_out) & set(trained)
    start = json.loads((dpo / "seed-0" / "start" / "model_outputs.json").read_text())
    final = json.loads((dpo / "seed-0" / "dpo" / "full" / "model_outputs.json").read_text())
    for outputs in (start, final):
        assert [row["instruction"] for row in outputs] == held_out
        assert all(set(row) == {"instruction", "output", "generator"} for row in outputs)
    assert {row["generator"] for row in start} == {"start"} != {row["generator"] for row in final}
    won = [
        1.0 if len(a["output"]) > len(b["output"]) else 0.5 if len(a["output"]) == len(b["output"]) else 0.0
        for a, b in zip(final, start, strict=True)
    ]
    rates = {(row["method"], row["arm"]): row for row in json.loads((dpo / "win_rates.json").read_text())}
    assert rates["dpo", "full"]["win_rate"] == pytest.approx(sum(won) / 4)
    assert curves(dpo / "seed-0" / "dpo" / "full")["win_rate/held_out"][4] == pytest.approx(sum(won) / 4)


def test_the_report_says_the_same_in_both_formats(dpo: Path) -> None:
    page, text = ((dpo / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    sentence = next(line for line in text.splitlines() if line.startswith("**")).strip("*")
    assert "1 seed: DPO wins" in sentence and "too few seeds" in sentence
    plain = page.replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<")
    for line in (sentence, "learning rate 0.02", "Only DPO was run: no reward was named (--reward)."):
        assert line in plain and line in text
    drawn = {path.stem for path in (dpo / "plots").glob("*.png")}
    assert {"g", "sides", "win_rates", "drift", "arms_dpo"} <= drawn and "arms_grpo" not in drawn
    assert page.count("<svg") == len(drawn) == text.count("](plots/")
    with (dpo / "points.csv").open(encoding="utf-8") as file:
        assert {row["arm"] for row in csv.DictReader(file)} == set(arms_of("dpo"))


def test_a_second_start_does_nothing_again(dpo: Path, inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (dpo / "points.csv").read_bytes()
    monkeypatch.setattr(real_run, "train", lambda *given, **options: pytest.fail("an arm was trained again"))
    assert main([*flags(seeds=1, judge="study_rewards:longer"), "--output", "dpo"]) == 0
    assert (dpo / "points.csv").read_bytes() == before


@pytest.mark.parametrize("arm", ["controlled", "no-reweighting"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    arm: str,
    dpo: Path,
    inside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [*flags(seeds=1, judge="study_rewards:longer"), "--arms", arm, "--output", str(tmp_path / "cut")]
    original = real_run.train

    def cut(*given: Any, say: Any, **options: Any) -> None:
        def until(step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt
            say(step)

        original(*given, say=until, **options)

    with monkeypatch.context() as patch:
        patch.setattr(real_run, "train", cut)
        assert main(command) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().out
    run = tmp_path / "cut" / "seed-0" / "dpo" / arm
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"] and not measured(run, "held_out")
    # of a line that was being written, and a checkpoint
    (run / "points.jsonl").write_text('{"seed": 0, "met', encoding="utf-8")
    (run / "checkpoint-3").mkdir()
    assert main(command) == 0
    again, once = curves(run), curves(dpo / "seed-0" / "dpo" / arm)
    for metric in once:
        assert again[metric] == pytest.approx(once[metric], abs=1e-6), metric


def test_seeds_and_arms_of_several_folders_pool(
    dpo: Path, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = flags(seeds=1, first_seed=1, judge="study_rewards:longer")
    assert main([*judged, "--arms", "full", "--output", str(tmp_path / "b")]) == 0
    both = pooled([dpo, tmp_path / "b"])
    assert both.seeds == [0, 1] and len(both.runs) == 6
    assert len(both.results.points) == sum(len(pooled([one]).results.points) for one in (dpo, tmp_path / "b"))
    assert main(["study", "--pool", str(dpo), str(tmp_path / "b"), "--output", str(tmp_path / "c")]) == 0
    assert "2 seeds: DPO wins" in capsys.readouterr().out
    text = (tmp_path / "c" / "report.md").read_text(encoding="utf-8")
    assert "Not all arms have all seeds: dpo full 2, dpo no negative 1" in text
    rates = {row["arm"]: row["seeds"] for row in json.loads((tmp_path / "c" / "win_rates.json").read_text())}
    assert rates["full"] == 2 and rates["controlled"] == 1
    # another start gives other curves
    one, other = (curves(folder / f"seed-{seed}" / "dpo" / "full") for seed, folder in enumerate((dpo, tmp_path / "b")))
    assert one["dpo_loss/train"][4] != other["dpo_loss/train"][4]
    capsys.readouterr()
    for folders, message in (
        ([dpo, dpo], "are the same run"),
        ([dpo, tmp_path / "nowhere"], "no such folder"),
        ([dpo, tmp_path], "holds no run of a study"),
        ([dpo, "--model", "model"], "--model is not of a report that --pool makes without --data"),
    ):
        assert main(["study", "--pool", *map(str, folders), "--output", str(tmp_path / "d")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    shutil.copytree(tmp_path / "b", tmp_path / "e")
    path = tmp_path / "e" / "seed-1" / "dpo" / "full" / "run.json"
    path.write_text(path.read_text().replace('"beta": 0.1', '"beta": 0.2'))
    assert main(["study", "--pool", str(dpo), str(tmp_path / "e"), "--output", str(tmp_path / "d")]) == 2
    assert "its beta is 0.2, there 0.1" in capsys.readouterr().err


def test_policies_learn_from_a_reward_on_trls_rollouts(inside: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: policies are not trained")
    arms = ("full", "no-negative", "no-reweighting")
    command = flags(seeds=1, reward="study_rewards:vowels", batch=16, micro_batch=8)
    assert main([*command, "--method", "grpo", "--arms", *arms, "--output", str(tmp_path / "x")]) == 0
    found = {arm: curves(tmp_path / "x" / "seed-0" / "grpo" / arm) for arm in arms}
    assert len({run["reward/held_out"][0] for run in found.values()}) == 1
    # the split reaches the policy's loss: from one start and the same first rollouts the models part
    assert len({run["entropy/held_out"][4] for run in found.values()}) == len(arms)
    full = found["full"]
    assert full["kl/held_out"][0] == pytest.approx(0.0, abs=1e-5) and full["kl/held_out"][4] != 0.0
    assert list(full["G"]) == [0, 2, 4] and not any(map(math.isnan, full["G"].values()))
    for step, whole in full["G"].items():
        sides = full["G/positive"][step], full["G/negative"][step]
        assert sum(sides) == pytest.approx(whole, abs=2e-3 * sum(map(abs, sides)))
    text = (tmp_path / "x" / "report.md").read_text(encoding="utf-8")
    assert "GRPO (TRL): clip 0.2, learning rate 0.02, 4 answers to a prompt" in text
    assert {path.stem for path in (tmp_path / "x" / "plots").glob("*.png")} >= {"g", "sides", "arms_grpo", "win_rates"}


def test_an_adapter_and_a_reward_model(inside: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = load_tokenizer(str(inside / "model"), [])
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    command = flags(seeds=1, reward=tmp_path / "judge", lora=4)
    assert main([*command, "--method", "dpo", "--arms", "full", "--output", str(tmp_path / "x")]) == 0
    run = tmp_path / "x" / "seed-0" / "dpo" / "full"
    assert (run / "checkpoint-4" / "adapter_config.json").exists()
    found = curves(run)
    assert found["dpo_loss/train"][4] < found["dpo_loss/train"][0] - 1e-3
    assert found["kl/held_out"][0] == pytest.approx(0.0, abs=1e-5)
    # at the start only one of an adapter's two factors has a gradient
    assert found["G"][0] > 0 and len({*found["reward/held_out"].values()}) > 1


UNPAIRED = {"prompt": "Say one.", "completion": "one", "label": True}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "grpo"], "--method grpo wants --reward"),
        (["--reward", "study_rewards:nothing"], "--reward study_rewards:nothing: not found"),
        (["--reward", "./nowhere"], "no such folder"),
        (["--judge", "judge"], "MODULE:FUNCTION is wanted"),
        (["--arms", "half"], "--arms half: expected of full"),
        (["--data", "unpaired.jsonl"], "holds single answers"),
        (["--data", "broken.jsonl"], "broken.jsonl: row 2: no rejected"),
        (["--data", "gone.jsonl"], "gone.jsonl: can't be read"),
        (["--model", "./gone"], "--model ./gone: no such folder"),
        (["--held-out", "20"], "20 prompts, of which 20 can't be held out"),
        (["--batch", "6"], "batch must be a multiple of micro_batch"),
        (["--max-new-tokens", "48"], "max_new_tokens must be below max_length"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--noise", "0.2"], "--noise is not of a study on a pretrained model"),
        (["--workers", "2"], "--workers is not of a study on a pretrained model"),
        (["--output", "."], "neither an empty folder nor one of such a study"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_sentence(
    options: list[str], message: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps(ROWS[0]), json.dumps({"prompt": "Say two.", "chosen": "two"})]
    (inside / "broken.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (inside / "unpaired.jsonl").write_text(json.dumps(UNPAIRED) + "\n", encoding="utf-8")
    assert main([*flags(), "--output", str(tmp_path / "x"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "x" / "seed-0").exists()


def test_a_folder_is_not_gone_on_with_under_other_settings(
    dpo: Path, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (dpo / "data" / "train.jsonl").read_bytes()
    assert main([*flags(seeds=1, judge="study_rewards:longer", beta=0.3), "--output", "dpo"]) == 2
    assert "was begun with beta 0.1, now it is 0.3" in capsys.readouterr().err
    assert main([*flags(seeds=1, judge="study_rewards:longer", held_out=5), "--output", "dpo"]) == 2
    assert (dpo / "data" / "train.jsonl").read_bytes() == before


def test_the_plan_is_said_and_nothing_is_written(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(reward="study_rewards:vowels"), "--plan", "--output", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    for words in ("DPO: beta 0.1, learning rate 0.02", "dpo update:", "rollout:", "G:", "updates of a seed on"):
        assert words in said
    assert not (tmp_path / "x").exists()


def test_learning_rates_of_pretrained_models() -> None:
    full, adapter = RealSettings("m", "d"), RealSettings("m", "d", lora=16)
    assert [full.lr("dpo"), full.lr("grpo")] == [5e-7, 1e-6]
    assert [adapter.lr("dpo"), adapter.lr("grpo")] == pytest.approx([5e-6, 1e-5])
    assert full.due == [0, 40, 80, 120, 160, 200]


def test_flat_weights_are_the_mean_of_the_update_before() -> None:
    flat = FlatWeights(0.5)
    assert flat.at(0.0).running_mean == 0.5
    flat.note(torch.tensor([0.1, 0.3]))
    # within an update the mean stays
    assert flat.at(0.0).running_mean == 0.5
    flat.note(torch.tensor([0.5, 0.7]))
    assert flat.at(0.25).running_mean == pytest.approx(0.4) and flat.at(0.25).reweight == "none"
    flat.note(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))
    assert flat.at(0.5).running_mean == pytest.approx(0.75)
    # without a first weight it is that of the first batch
    rollouts = FlatWeights(None)
    rollouts.note(torch.tensor([2.0, 4.0]))
    assert rollouts.at(0.0).running_mean == pytest.approx(3.0)


def test_bootstrap_intervals_cover_the_mean() -> None:
    draw, covered = random.Random(0), 0
    for _ in range(60):
        values = [float(draw.random() < 0.6) for _ in range(60)]
        low, high = interval(values)
        assert low < sum(values) / len(values) < high
        covered += low <= 0.6 <= high
    # of 95 %, three standard errors
    assert covered >= 60 * (0.95 - 3 * (0.95 * 0.05 / 60) ** 0.5)
    assert all(map(math.isnan, interval([1.0, 1.0]))) and all(map(math.isnan, interval([0.5])))
