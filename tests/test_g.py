"""``fused-po g``: the numbers of ``gradient_alignment``, written as they come, resumed, refused in a sentence."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po import losses
from fused_po.cli import main
from fused_po.cli.g import read_points
from fused_po.cli.g_report import sentence
from fused_po.diagnostics import Examples, Rollout, gradient_alignment, rollout_examples, write_rollouts
from fused_po.diagnostics.prediction import KERNEL_BLOCKS
from fused_po.diagnostics.rollouts import read_rollouts
from fused_po.trainers.batches import collate
from fused_po.trainers.data import load_preferences
from fused_po.trainers.loading import load_tokenizer
from fused_po.trainers.model import token_stats_of

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["red", "blue", "green", "warm", "cold", "tall"]
ROWS = [{"prompt": f"Is it {w}?", "chosen": f"Yes, it is {w}.", "rejected": f"Go away now, {w}."} for w in WORDS]
TOKENIZER = load_tokenizer("tiny", [text for row in ROWS for text in row.values()])
STEPS = (10, 20, 30)


def policy(step: int) -> LlamaForCausalLM:
    """Checkpoints of a run that nobody trained: each a little further in one direction."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes, **ids)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * step * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("run")
    for step in STEPS:
        policy(step).save_pretrained(found / f"checkpoint-{step}")
        TOKENIZER.save_pretrained(found / f"checkpoint-{step}")
    (found / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return found


def arguments(folder: Path, output: Path, *others: str) -> list[str]:
    checkpoints = [str(folder / f"checkpoint-{step}") for step in STEPS]
    fixed = ["--batch-size", "4", "--max-length", "64", "--max-new-tokens", "6", "--prompts", "3", "--device", "cpu"]
    data = ["--data", str(folder / "pairs.jsonl")] if "--data" not in others else []
    return ["g", "--checkpoints", *checkpoints, *data, *fixed, "--output", str(output), *others]


def points(output: Path) -> dict[int, list[dict[str, float]]]:
    """step -> draw -> part -> G over all blocks."""
    return {
        one["step"]: [{part: sum(blocks.values()) for part, blocks in draw["g"].items()} for draw in one["draws"]]
        for one in read_points(output)
    }


def examples(model: torch.nn.Module, reference: torch.nn.Module, source: Path) -> list[Examples]:
    rows = list(load_preferences(str(source), TOKENIZER, max_length=64).rows)
    batch = collate(rows, TOKENIZER.pad_token_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ref = token_stats_of(reference, inputs, batch["labels"]).logp
    return [Examples(inputs, batch["labels"], {"ref_logp": ref.double().sum(1)})]


@pytest.mark.parametrize("method", ["exact", "directional"])
def test_the_numbers_are_those_of_gradient_alignment(folder, tmp_path, method, capsys):
    parts = "sides,thirds,layers,no_reweighting"
    assert main(arguments(folder, tmp_path / "out", "--method", method, "--parts", parts, "--count-memory")) == 0
    found = points(tmp_path / "out")
    assert sorted(found) == list(STEPS)
    loss, target = losses.create("sigmoid"), rollout_examples(read_rollouts(tmp_path / "out" / "final.jsonl"), 0)
    for step in STEPS:
        data = examples(policy(step), policy(STEPS[0]), folder / "pairs.jsonl")
        want = gradient_alignment(policy(step), data, loss, target, method="exact")
        scale = sum(abs(want[part]) for part in ("positive", "negative", "rest"))
        (draw,) = found[step]
        assert set(draw) == set(want.values)
        for part in want.values:
            assert abs(draw[part] - want[part]) <= (1e-4 if method == "exact" else 0.02) * scale, (step, part)
        assert draw["positive"] + draw["negative"] + draw["rest"] == pytest.approx(draw["whole"], abs=1e-9 * scale)
        for side in ("positive", "negative"):
            thirds = sum(draw[f"{side}/{third}"] for third in ("top", "middle", "bottom"))
            assert thirds == pytest.approx(draw[side], abs=1e-9 * scale)
    for one in read_points(tmp_path / "out"):
        assert set(one["draws"][0]["g"]["whole"]) == {"layers.0", "layers.1", "embed_tokens", "lm_head", "norm"}
        # blocks of rows that the kernels of a CPU work on are more than all of this model
        assert abs(one["predicted_bytes"] - KERNEL_BLOCKS["cpu"] - one["peak_bytes"]) <= 0.1 * one["peak_bytes"]
        assert -1 <= one["draws"][0]["cosine"]["whole"] <= 1
    with (tmp_path / "out" / "g.csv").open() as file:
        table = list(csv.DictReader(file))
    whole = [float(row["g"]) for row in table if row["part"] == "whole" and row["step"] == "20"]
    assert sum(whole) == pytest.approx(found[20][0]["whole"]) and len(whole) == 5
    # cosines sum over blocks and parts as G does
    cosine = {one["step"]: one["draws"][0]["cosine"]["whole"] for one in read_points(tmp_path / "out")}
    for step in STEPS:
        rows = [row for row in table if row["step"] == str(step)]
        for parts in (["whole"], ["positive", "negative", "rest"]):
            assert sum(float(row["cosine"]) for row in rows if row["part"] in parts) == pytest.approx(cosine[step])
    assert (tmp_path / "out" / "g.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "memory at the peak" in said and "s a checkpoint" in said
    page = (tmp_path / "out" / "g.md").read_text()
    assert sentence(read_points(tmp_path / "out")) in page
    assert f"pairs.jsonl, {len(ROWS)} of {len(ROWS)} rows" in page and "3 greedy answers of checkpoint-30" in page
    assert "reference: checkpoint-10, the first checkpoint" in page and f"method {method}, float32" in page


def test_draws_of_sampled_answers_differ_and_the_seed_decides_them(folder, tmp_path, capsys):
    for name in ("one", "two"):
        given = arguments(folder, tmp_path / name, "--final", "sampled", "--draws", "3", "--parts", "sides")
        assert main(given) == 0
    one, two = points(tmp_path / "one"), points(tmp_path / "two")
    assert one == two
    assert {len(draws) for draws in one.values()} == {3}
    assert len({draw["whole"] for draw in one[20]}) == 3
    mean = sum(draw["whole"] for draw in one[20]) / 3
    assert f"checkpoint-20: G {mean:.4g}," in capsys.readouterr().out
    assert "by more than twice the standard error over draws of D'" in (tmp_path / "one" / "g.md").read_text()
    assert "positive/top" not in one[20][0]


def test_a_measurement_that_was_killed_goes_on(folder, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "fused_po", *arguments(folder, output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = output / "points-0.jsonl"
    while run.poll() is None and not (first.exists() and first.stat().st_size):
        time.sleep(0.02)
    run.kill()
    run.wait()
    before = first.read_text()
    assert before.count("\n") >= 1
    # a kill within a line leaves half of one
    first.write_text(before.splitlines(keepends=True)[0] + '{"checkpoint": "checkpoint-20", "ste')
    with pytest.raises(SystemExit):
        main(["g", "--resume"])
    assert main(arguments(folder, output)) == 2
    assert main(arguments(folder, output, "--resume")) == 0
    assert first.read_text().startswith(before.splitlines(keepends=True)[0])
    assert main(arguments(folder, tmp_path / "whole")) == 0
    assert points(output) == points(tmp_path / "whole")
    assert (output / "g.csv").read_text() == (tmp_path / "whole" / "g.csv").read_text()


def test_processes_share_the_checkpoints(folder, tmp_path):
    output = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "fused_po", *arguments(folder, output)], env={**environment, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    counts = {path.name: path.read_text().count("\n") for path in output.glob("points-*.jsonl")}
    assert counts == {"points-0.jsonl": 2, "points-1.jsonl": 1}
    assert main(arguments(folder, tmp_path / "alone")) == 0
    assert points(output) == points(tmp_path / "alone")


def test_rollouts_as_d_and_a_file_as_final(folder, tmp_path, capsys):
    rows = [
        Rollout([5, 6], [7 + step, 8, 9], [-6.0, -6.1, -5.9], None, advantage, None, step)
        for step in STEPS
        for advantage in (1.0, -0.5)
    ]
    write_rollouts(tmp_path / "rollouts.jsonl", rows)
    write_rollouts(tmp_path / "final.jsonl", [Rollout([5, 6], [9, 10])])
    given = ["--data", str(tmp_path / "rollouts.jsonl"), "--final", str(tmp_path / "final.jsonl"), "--loss", "ppo"]
    assert main(arguments(folder, tmp_path / "out", *given)) == 0
    found, loss = points(tmp_path / "out"), losses.create("ppo")
    for step in STEPS:
        data = rollout_examples([one for one in rows if one.step == step], 0, loss.needs)
        target = rollout_examples([Rollout([5, 6], [9, 10])], 0)
        want = gradient_alignment(policy(step), data, loss, target, method="exact")
        assert found[step][0]["whole"] == pytest.approx(want["whole"], rel=0.02, abs=1e-4)
    # answers as text, as people have them
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Is it red?", "completion": "Yes, it is red."}) + "\n")
    assert main(arguments(folder, tmp_path / "texts", "--final", str(texts), "--parts", "sides")) == 0
    texts.write_text(texts.read_text() + "\n" + json.dumps({"prompt": "Is it?", "completion": 3}) + "\n")
    assert main(arguments(folder, tmp_path / "wrong", "--final", str(texts), "--parts", "sides")) == 2
    assert f"--final {texts}: row 3: completion must be a string" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["kto", "sft", "ipo", "ppo", "sigmoid+sft", "aot"])
def test_losses_of_all_families(folder, tmp_path, loss):
    assert main(arguments(folder, tmp_path / "out", "--loss", loss, "--parts", "sides", "--prompts", "1")) == 0
    assert all(draws[0]["whole"] != 0 for draws in points(tmp_path / "out").values())


def test_adapters_alone(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    policy(10).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    for step in STEPS:
        torch.manual_seed(step)
        model = LlamaForCausalLM.from_pretrained(base)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / f"checkpoint-{step}")
        TOKENIZER.save_pretrained(tmp_path / f"checkpoint-{step}")
    (tmp_path / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text())
    only = ["--lora-only", "--parts", "sides,layers", "--method", "exact"]
    assert main(arguments(tmp_path, tmp_path / "only", *only)) == 0
    assert set(read_points(tmp_path / "only")[0]["draws"][0]["g"]["whole"]) == {"layers.0", "layers.1"}
    # of the merged model, all parameters count
    assert main(arguments(tmp_path, tmp_path / "merged", *only[1:])) == 0
    assert "embed_tokens" in read_points(tmp_path / "merged")[0]["draws"][0]["g"]["whole"]
    assert points(tmp_path / "merged") != points(tmp_path / "only")
    assert main(arguments(folder, tmp_path / "none", "--lora-only")) == 2


def test_half_precision_and_activations_that_are_made_again(folder, tmp_path):
    exact = ["--method", "exact", "--parts", "sides"]
    assert main(arguments(folder, tmp_path / "wide", *exact)) == 0
    assert main(arguments(folder, tmp_path / "again", *exact, "--gradient-checkpointing")) == 0
    assert main(arguments(folder, tmp_path / "half", *exact, "--dtype", "bfloat16")) == 0
    wide, again, half = (points(tmp_path / name) for name in ("wide", "again", "half"))
    for step in STEPS:
        scale = abs(wide[step][0]["positive"]) + abs(wide[step][0]["negative"])
        assert abs(again[step][0]["whole"] - wide[step][0]["whole"]) <= 1e-5 * scale
        # D' of a model in half precision are other answers
        assert half[step][0]["whole"] != wide[step][0]["whole"] and half[step][0]["positive"] != 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--parts", "side"], "--parts side: expected some of sides, thirds, layers, no_reweighting"),
        (["--loss", "sigmoit"], "sigmoit"),
        (["--loss-arg", "beta"], "--loss-arg beta: NAME=VALUE is wanted"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 needs --method exact"),
        (["--data", "EMPTY"], "empty.jsonl: is empty"),
        (["--final", "LONG"], "long.jsonl: holds no row that can be learned (1 dropped"),
        (["--final", "nowhere.jsonl"], "--final nowhere.jsonl: neither greedy nor sampled, nor a file"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: can't be read"),
        (["--reference", "./nowhere"], "no model for './nowhere'"),
        (["--max-new-tokens", "64"], "leaves no room for a prompt within --max-length"),
        (["--resume"], "nothing to resume"),
        (["--device", "tpu"], "--device tpu"),
        (["--checkpoints", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, change, message, capsys):
    files = {"EMPTY": tmp_path / "empty.jsonl", "LONG": tmp_path / "long.jsonl"}
    files["EMPTY"].write_text("")
    files["LONG"].write_text(json.dumps({"prompt": "?" * 999, "completion": "no"}) + "\n")
    assert main(arguments(folder, tmp_path / "out", *(str(files.get(word, word)) for word in change))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fused-po: ") and message in error
    # the same folder takes the command as it is mended
    assert not (tmp_path / "out").exists()


def test_rollouts_that_do_not_suit_the_loss(folder, tmp_path, capsys):
    write_rollouts(tmp_path / "rollouts.jsonl", [Rollout([5, 6], [7])])
    data = ["--data", str(tmp_path / "rollouts.jsonl")]
    assert main(arguments(folder, tmp_path / "out", *data)) == 2
    assert "loss 'sigmoid' is none of rollouts: it compares pairs" in capsys.readouterr().err
    asked = ["--loss", "ppo", "--reference", str(folder / "checkpoint-10")]
    assert main(arguments(folder, tmp_path / "asked", *data, *asked)) == 2
    assert "--reference: loss 'ppo' asks none on" in capsys.readouterr().err
    assert main(arguments(folder, tmp_path / "ppo", *data, "--loss", "ppo")) == 2
    assert "the loss reads advantage, which 1 of 1 rollouts lack" in capsys.readouterr().err


def test_another_measurement_is_not_continued(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", "--parts", "sides")) == 0
    assert main(arguments(folder, tmp_path / "out", "--parts", "sides", "--resume", "--seed", "3")) == 2
    assert "--resume with another --seed: 3, it began with 0" in capsys.readouterr().err


def test_predict_only_measures_nothing(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", "--predict-only")) == 0
    assert "memory at the peak" in capsys.readouterr().out and not (tmp_path / "out").exists()
