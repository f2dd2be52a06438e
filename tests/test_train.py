"""``fused-po train``: what it writes, that it learns, resumes bit by bit, compares, and refuses bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fused_po.cli import compare as comparing
from fused_po.cli import main
from fused_po.cli.train import with_config
from fused_po.trainers.loading import load_model, load_tokenizer
from tests.forked import python

WORDS = ["red", "blue", "green", "warm", "cold", "tall"]


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [{"prompt": f"Is it {w}?", "chosen": f"Yes, it is {w}.", "rejected": "Go away now."} for w in WORDS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_model(folder: Path) -> str:
    """A Llama small enough to train in milliseconds, in a folder as users have them."""
    tokenizer = load_tokenizer("tiny", WORDS * 4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    return str(folder / "small")


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory):
    command.model = small_model(tmp_path_factory.mktemp("models"))


def command(data: Path, output: Path, *more: str) -> list[str]:
    files = ["--data", str(data), "--output", str(output)]
    return ["train", "--model", command.model, *files, "--batch-size", "2", "--steps", "4", *more]


def rows(output: Path, split: str = "train") -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output / "model").state_dict()


def test_it_learns_and_writes_everything(data, tmp_path):
    output = tmp_path / "out"
    assert (
        main([*command(data, output, "--eval-data", str(data), "--lr", "1e-3", "--eval-every", "2"), "--steps", "6"])
        == 0
    )
    train, held_out = rows(output), rows(output, "eval")
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held_out] == [0, 2, 4, 6]
    assert held_out[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.05
    assert held_out[-1]["rewards/accuracies"] > 0.9 > held_out[0]["rewards/accuracies"]
    assert (output / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model(**tokenizer("Is it red?", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "dapo", "sft", "simpo"])
def test_compare_agrees(data, tmp_path, loss):
    output = tmp_path / "out"
    assert main(command(data, output, "--loss", loss, "--compare")) == 0
    found = json.loads((output / "compare.json").read_text())
    assert found["agrees"] and found["steps"] == 4
    assert 0 < found["largest_gradient_difference"] < 1e-4
    assert found["peak_memory_bytes"]["fused"] < found["peak_memory_bytes"]["plain"]


def put_one_gradient_off(monkeypatch) -> None:
    """The fused gradient of the first step is off by a thousandth."""
    before = comparing.gradients
    calls = []

    def off(model):
        calls.append(model)
        found = before(model)
        return [g * 1.001 for g in found] if len(calls) == 2 else found

    monkeypatch.setattr(comparing, "gradients", off)


def test_compare_fails_where_the_paths_differ(data, tmp_path, monkeypatch, capsys):
    """A fused gradient that is off by a thousandth is found out."""
    put_one_gradient_off(monkeypatch)
    assert main(command(data, tmp_path / "out", "--compare")) == 1
    assert "disagree" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["disagreeing_steps"] == [1]


def test_lora_trains_an_adapter_and_saves_a_model(data, tmp_path):
    output = tmp_path / "out"
    assert main(command(data, output, "--lora", "4", "--compare", "--lr", "1e-3")) == 0
    full = tmp_path / "full"
    assert main(command(data, full, "--lr", "1e-3")) == 0
    merged, trained = weights(output), weights(full)
    # the adapter in a folder is part of the model that starts from it
    again = load_model(str(output / "checkpoint-4"), None, 0).state_dict()
    assert all(torch.equal(again[name], merged[name]) for name in merged)
    assert merged.keys() == trained.keys()
    start = tmp_path / "start"
    assert main([*command(data, start, "--lr", "1e-12"), "--steps", "1"]) == 0
    first = weights(start)
    # the head stays as it was, the layers do not
    torch.testing.assert_close(merged["lm_head.weight"], first["lm_head.weight"])
    assert not torch.allclose(merged["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("extra", [[], ["--lora", "2"], ["--loss", "kto"]])
def test_ctrl_c_and_resume_give_the_same_weights(data, tmp_path, extra):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(data, whole, *extra)) == 0
    script = (
        "import os, signal, sys\n"
        "from fused_po.cli import main\n"
        "from fused_po.trainers.preferences import PreferenceTrainer as Trainer\n"
        "before = Trainer.training_step\n"
        "def step(self, *given, **named):\n"
        "    if self.state.global_step == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return before(self, *given, **named)\n"
        "Trainer.training_step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = python("-c", script, *command(data, broken, *extra), cwd=tmp_path)
    assert run.returncode == 130, run.stderr
    assert "stopped after step 2: the same command with --resume continues" in run.stdout
    assert not (broken / "model").exists()
    assert main(command(data, broken, *extra, "--resume")) == 0
    assert rows(broken) == rows(whole)
    ours, theirs = weights(broken), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_more_steps_continue_a_run(data, tmp_path):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    assert main([*command(data, whole), "--steps", "5"]) == 0
    assert main([*command(data, longer), "--steps", "2"]) == 0
    assert main([*command(data, longer), "--steps", "5", "--resume"]) == 0
    assert rows(longer) == rows(whole)
    ours, theirs = weights(longer), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_single_answers_train_one_at_a_time(tmp_path):
    path = tmp_path / "single.jsonl"
    single = [
        {"prompt": f"Is it {w}?", "completion": f"Yes, {w}.", "label": index % 2} for index, w in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in single))
    output = tmp_path / "out"
    assert main([*command(path, output, "--loss", "kto", "--eval-data", str(path)), "--batch-size", "1"]) == 0
    assert all(row["loss"] > 0 and row["kl"] >= 0 for row in rows(output) + rows(output, "eval"))


def test_flags_of_a_file_stand_before_those_of_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "steps: 3\nloss_arg: {simpo_gamma: 0.5}\ncompare: true\nresume: false\nlora:\nfsdp_config: {a: 1}\nbf16: true\n"
    )
    found = with_config(["train", "--config", str(path), "--steps", "4"])
    flags = [
        "--steps",
        "3",
        "--loss-arg",
        "simpo_gamma=0.5",
        "--compare",
        "--fsdp-config",
        '{"a": 1}',
        "--bf16",
        "True",
    ]
    assert found == ["train", *flags, "--config", str(path), "--steps", "4"]
    assert with_config(["train", f"--config={path}"])[1:-1] == flags
    for text, message in (
        ("- a list", "a mapping of flags is wanted, got list"),
        ("compare: maybe", "compare must be true or false, got 'maybe'"),
        ("a: [\n", "while parsing a flow node .* line 2, column 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            with_config(["train", "--config", str(path)])
        assert main(["train", "--config", str(path)]) == 2
    assert "usage" not in capsys.readouterr().err


def test_the_engine_takes_its_own_flags(data, tmp_path):
    output = tmp_path / "out"
    more = ["--gradient-accumulation-steps", "3", "--max_grad_norm", "0.5", "--logging-steps", "2", "--loss", "simpo"]
    # a value may be called like a flag of ours
    more += ["--metric-for-best-model", "loss"]
    assert main(command(data, output, *more, "--loss-arg", "simpo_gamma=1.5", "--beta", "2.0")) == 0
    assert [row["step"] for row in rows(output)] == [2, 4]
    found = torch.load(output / "model" / "training_args.bin", weights_only=False)
    assert (found.gradient_accumulation_steps, found.max_grad_norm) == (3, 0.5)


def test_compare_takes_a_mixture_of_experts(data, tmp_path):
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    load_tokenizer(command.model, []).save_pretrained(tmp_path / "experts")
    given = [*command(data, tmp_path / "out", "--compare"), "--model", str(tmp_path / "experts"), "--steps", "2"]
    assert main(given) == 0


def test_a_real_interrupt_of_the_program(data, tmp_path):
    """SIGINT to the installed command, while it trains."""
    output = tmp_path / "out"
    arguments = [*command(data, output), "--steps", "100000"]
    run = subprocess.Popen([sys.executable, "-m", "fused_po", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        log = output / "metrics.jsonl"
        while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
            time.sleep(0.2)
        time.sleep(1.0)
        run.send_signal(signal.SIGINT)
        text, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert "--resume continues" in text
    (last,) = output.glob("checkpoint-*")
    assert AutoModelForCausalLM.from_pretrained(last).num_parameters()


def test_resume_refuses_another_run(data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(data, output)) == 0
    assert main(command(data, output, "--resume")) == 2
    assert "has taken 4 steps; --steps above that continue it" in capsys.readouterr().err
    assert main([*command(data, output, "--resume", "--loss", "hinge"), "--steps", "6"]) == 2
    assert "--resume with another --loss: hinge, the run began with sigmoid" in capsys.readouterr().err
    assert main(command(data, tmp_path / "new", "--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err
    before = data.read_text()
    data.write_text("".join(reversed(before.splitlines(keepends=True))))
    assert main(command(data, output, "--resume")) == 2
    assert "its contents have changed" in capsys.readouterr().err
    data.write_text(before)
    state = output / "checkpoint-4" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert main([*command(data, output, "--resume"), "--steps", "6"]) == 2
    assert "optimizer.pt can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["kto", "sigmoid", "orpo"])
def test_margins_are_those_of_the_rewards(data, tmp_path, loss):
    output = tmp_path / "out"
    assert main(command(data, output, "--loss", loss, "--eval-data", str(data), "--eval-every", "2")) == 0
    for row in rows(output) + rows(output, "eval"):
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)


def test_training_that_diverges_stops(data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(data, output, "--loss", "sft", "--lr", "1e30")) == 1
    assert "gradient norm" in capsys.readouterr().err
    assert not (output / "model").exists()
    assert "NaN" not in (output / "metrics.jsonl").read_text()


def test_a_model_whose_head_does_more_is_refused(data, tmp_path, capsys, monkeypatch):
    real = LlamaForCausalLM.forward

    def shifted(self, *arguments, **options):
        found = real(self, *arguments, **options)
        found.logits = found.logits.clamp(max=1.5)
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    # whatever the reference of such a model is kept under must not hide it
    assert main(command(data, tmp_path / "out")) == 2
    assert "not its output layer's alone, it does clamp to them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--loss", "dpo"], "unknown loss 'dpo' ('sigmoid' is that loss): expected one of"),
        (["--loss", "sft", "--beta", "0.1"], "loss 'sft' has no hyper-parameter beta"),
        (["--beta", "-1"], "beta must lie in"),
        (["--data", "none.jsonl"], "none.jsonl: can't be read"),
        (["--model", "/no/such/folder"], "--model /no/such/folder: no such folder"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--loss", "simpo", "--loss-arg", "simpo_gamma"], "--loss-arg simpo_gamma: NAME=VALUE is wanted"),
        (["--loss", "simpo", "--loss-arg", "gamma=1"], "loss 'simpo' has no hyper-parameter gamma"),
        (["--split", "positive"], "--split positive: expected one of controlled_dpo"),
        (["--split", "psr", "--split-arg", "a=1"], "--split-arg: psr() got an unexpected keyword argument 'a'"),
        (["--split-arg", "a=1"], "--split-arg wants --split"),
        (["--eval-every", "2"], "--eval-every wants --eval-data"),
        (["--eval-strategy", "epoch"], "--eval-strategy wants --eval-data"),
        (["--fp16"], "--fp16 needs a GPU"),
        (["--use-liger-kernel"], "--use-liger-kernel needs a GPU"),
        (["--label-smoothing-factor", "0.1"], "label_smoothing_factor is not read: take the loss 'conservative'"),
        (["--load-best-model-at-end"], "but found - Evaluation strategy"),
        (["--learning-rte", "1"], "unknown arguments: --learning-rte 1"),
        (["--compare", "--gradient-accumulation-steps", "2"], "--compare takes one process"),
        (["--compare", "--dtype", "bfloat16"], "--compare needs float32"),
        (["--compare", "--bf16"], "--compare needs float32"),
        (["--learning_rate=0.5"], "--learning-rate is not taken: give --lr"),
        (["--output-dir", "x"], "--output-dir is not taken: give --output"),
        (["--resume-from-checkpoint", "x"], "--resume-from-checkpoint is not taken: give --resume"),
        (["--max-length", "3", "--on-too-long", "refuse"], "row 1: 22 tokens, more than 3"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(data, tmp_path, capsys, change, message):
    output = tmp_path / "out"
    assert main(command(data, output, *change)) == 2
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if not line.startswith("... ")]
    assert len(said) == 1 and said[0].startswith("fused-po: ") and message in said[0]
    assert not output.exists()


@pytest.mark.parametrize("change", [["--steps", "0"], ["--lr", "x"], ["--batch-size", "-2"], ["--lora", "1.5"]])
def test_bad_numbers_are_refused_by_the_parser(data, tmp_path, capsys, change):
    with pytest.raises(SystemExit) as stop:
        main(command(data, tmp_path / "out", *change))
    assert stop.value.code == 2
    assert change[0] in capsys.readouterr().err


def test_an_output_folder_that_exists_is_left_alone(data, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    assert main(command(data, output)) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert os.listdir(output) == ["precious"]
    assert main(command(data, output / "precious")) == 2
    assert "is a file" in capsys.readouterr().err
