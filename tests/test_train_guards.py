"""``fused-po train``: runs that log nothing, crash early or tear their log; streaming beside held-out rows."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from fused_po.cli import main
from fused_po.cli.report import Bar, Report
from fused_po.trainers.preferences import PreferenceTrainer
from tests.test_train import command, data, model, put_one_gradient_off, rows, weights

__all__ = ["data", "model"]


def test_a_run_that_logs_nothing_keeps_its_model(data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(data, output, "--logging-steps", "100")) == 0
    assert weights(output) and rows(output) == []
    assert not (output / "metrics.png").exists() and "metrics.png" not in capsys.readouterr().out


def test_what_is_done_before_the_first_step_is_said(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fused_po.cli.progress.QUIET", 0.01)
    for name, answer in (("a", "computed"), ("b", "from the cache")):
        assert main([*command(data, tmp_path / name, "--seed", "71"), "--model", "tiny", "--steps", "1"]) == 0
        said = capsys.readouterr()
        assert f"reference log-probs: {answer}\n" in said.out
        assert "... loading the model" in said.err
    assert main([*command(data, tmp_path / "c", "--loss", "simpo"), "--steps", "1"]) == 0
    assert "reference" not in capsys.readouterr().out


def test_a_cache_that_is_full_is_named(data, tmp_path, monkeypatch, capsys):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", full)
    assert main(command(data, tmp_path / "out")) == 2
    assert re.search(r"what is read can't be kept in .*fused_po \(.*No space left", capsys.readouterr().err)


def test_answers_of_one_side_have_no_margin(tmp_path):
    path, output = tmp_path / "single.jsonl", tmp_path / "out"
    liked = [{"prompt": f"Is it {one}?", "completion": "Yes.", "label": True} for one in ("red", "blue")]
    path.write_text("".join(json.dumps(row) + "\n" for row in liked))
    assert main([*command(path, output, "--loss", "kto"), "--steps", "1"]) == 0
    (row,) = rows(output)
    assert "rewards/chosen" in row and "rewards/margins" not in row


def test_steps_that_take_long_are_said_one_by_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fused_po.cli.report.QUIET_LATER", 0.0)
    report = Report(tmp_path / "log", None, None)
    logs = {"step": 1, "loss": 0.5}
    state = SimpleNamespace(log_history=[logs], is_world_process_zero=True, global_step=1, max_steps=1000)
    report.on_log(None, state, None, logs)
    assert capsys.readouterr().out == "step    1  loss 0.5000\n"


def test_a_crash_before_the_first_checkpoint_can_be_resumed(data, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["--eval-data", str(data)]
    assert main(command(data, whole, *more)) == 0
    before = PreferenceTrainer.training_step

    def crash(self, *given, **named):
        if self.state.global_step == 2:
            raise MemoryError
        return before(self, *given, **named)

    monkeypatch.setattr(PreferenceTrainer, "training_step", crash)
    with pytest.raises(MemoryError):
        main(command(data, broken, *more))
    monkeypatch.undo()
    assert main(command(data, broken, *more, "--resume", "--loss", "hinge")) == 2
    assert "--resume with another --loss" in capsys.readouterr().err
    assert main(command(data, broken, *more, "--resume")) == 0
    assert rows(broken) == rows(whole)
    assert rows(broken, "eval") == rows(whole, "eval")
    ours, theirs = weights(broken), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_log_that_was_torn_or_ran_ahead_is_written_anew(data, tmp_path):
    """A continued run has what its checkpoint knows, whatever a crash left in the file."""
    output = tmp_path / "out"
    log = output / "metrics.jsonl"
    assert main([*command(data, output), "--steps", "2"]) == 0
    kept = rows(output)
    log.write_text("torn\n" + json.dumps({**kept[0], "step": 3}) + '\n{"step": 3, "spl')
    assert main(command(data, output, "--resume")) == 0
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4] and rows(output)[:2] == kept


def test_a_continued_run_keeps_its_warm_up(data, tmp_path, capsys):
    """More steps would have a longer one, and begin it again in the middle."""
    output = tmp_path / "out"
    assert main([*command(data, output, "--loss", "simpo", "--lr", "1e-3"), "--steps", "3"]) == 0
    assert main([*command(data, output, "--loss", "simpo", "--lr", "1e-3", "--resume"), "--steps", "50"]) == 0
    assert [row["learning_rate"] for row in rows(output)] == [1e-3] * 50
    given = [*command(data, output, "--loss", "simpo", "--lr", "1e-3", "--resume"), "--steps", "60"]
    assert main([*given, "--warmup-steps", "9"]) == 2
    assert "--resume with another --warmup-steps" in capsys.readouterr().err


def test_ranks_that_hear_of_an_interrupt_at_different_times_stop_together(tmp_path):
    """The first Ctrl-C of a rank is no second one because another rank had heard it before."""
    arguments, elsewhere = SimpleNamespace(device="cpu", world_size=2, eval_strategy="no"), [1.0]
    report = Report(tmp_path / "log", SimpleNamespace(reduce=lambda asked, how: asked + elsewhere[0]), None)
    state, control = SimpleNamespace(global_step=1, max_steps=9), SimpleNamespace(should_evaluate=False)
    report.on_step_end(arguments, state, control)
    assert report.interrupted and control.should_save and control.should_training_stop
    with report:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    # where it is heard after the step that the ranks agreed on, the next one is the last
    late, elsewhere[0] = SimpleNamespace(should_evaluate=False), 0.0
    heard = Report(tmp_path / "log", report._accelerator, None)
    heard.on_step_end(arguments, state, late)
    assert not heard.interrupted and not hasattr(late, "should_save")


@pytest.mark.nightly
def test_two_processes_stop_after_the_same_step(data, tmp_path):
    """One hears of Ctrl-C a step before the other, which hears of it while the checkpoint is written."""
    script = (
        "import os, signal, sys\n"
        "from fused_po.cli import main\n"
        "from fused_po.trainers.preferences import PreferenceTrainer as Trainer\n"
        "rank, step, save = int(os.environ['RANK']), Trainer.training_step, Trainer._save_checkpoint\n"
        "def trained(self, *given, **named):\n"
        "    if rank == 0 and self.state.global_step == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self, *given, **named)\n"
        "def saved(self, *given, **named):\n"
        "    if rank == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        # in one piece, for both write to one pipe
        "    os.write(1, f'saves {rank} {self.state.global_step}\\n'.encode())\n"
        "    return save(self, *given, **named)\n"
        "Trainer.training_step, Trainer._save_checkpoint = trained, saved\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    output = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", "--standalone", sys.executable]
    given = [sys.executable, *launch, "-c", script, *command(data, output, "--device", "cpu", "--steps", "50")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(given, capture_output=True, text=True, timeout=400, env=environment)
    assert sorted(line for line in run.stdout.splitlines() if line.startswith("saves")) == ["saves 0 2", "saves 1 2"]
    assert "stopped after step 2" in run.stdout and run.stderr.count("exitcode  : 130") >= 1, run.stderr
    assert [one.name for one in output.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_bar_shows_the_last_step_and_ends_with_training_that_raised(tmp_path, capsys):
    bar = Bar()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=1, log_history=[])
    with pytest.raises(FloatingPointError), Report(tmp_path / "log", None, bar):
        bar.on_train_begin(None, state, None)
        bar.training_bar.ncols, bar.training_bar.dynamic_ncols = 100, None
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, {"loss": 0.5, "rewards/margins": 0.25})
        raise FloatingPointError
    shown = capsys.readouterr().err
    assert "1/4" in shown and "loss 0.5000  margin +0.250" in shown and shown.endswith("\n")


def test_streaming_takes_rows_of_the_training_data_alone(data, tmp_path, capsys):
    more = ["--eval-data", str(data), "--streaming", "--batch-size", "1"]
    assert main([*command(data, tmp_path / "out", *more), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "pairs.jsonl: 2 rows" in said and "pairs.jsonl: 6 rows" in said
    given = [*command(data, tmp_path / "no", *more), "--num-train-epochs", "1"]
    place = given.index("--steps")
    assert main([*given[:place], *given[place + 2 :]]) == 2
    assert "--streaming wants --steps" in capsys.readouterr().err


def test_a_comparison_goes_on_where_it_was(data, tmp_path, monkeypatch):
    """A step that disagreed before an interrupt still does after it."""
    output = tmp_path / "out"
    put_one_gradient_off(monkeypatch)
    assert main([*command(data, output, "--compare"), "--steps", "2"]) == 1
    monkeypatch.undo()
    # as an interrupt leaves it
    (output / "compare.json").unlink()
    assert main(command(data, output, "--compare", "--resume")) == 1
    found = json.loads((output / "compare.json").read_text())
    assert [row["step"] for row in found["rows"]] == [1, 2, 3, 4] and found["disagreeing_steps"] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--gradient-accumulation-steps", "2"], "--gradient-accumulation-steps: 2, the run began with 1"),
        (["--data-seed", "7"], "--data-seed: 7, the run began with 0"),
        (["--streaming"], "--streaming: True, the run began with False"),
    ],
)
def test_resume_refuses_another_order_of_rows(data, tmp_path, capsys, change, message):
    output = tmp_path / "out"
    assert main([*command(data, output), "--steps", "1"]) == 0
    assert main(command(data, output, "--resume", *change)) == 2
    assert f"--resume with another {message}" in capsys.readouterr().err


def test_resume_compares_the_files_of_a_folder(data, tmp_path, capsys):
    folder, output = tmp_path / "rows", tmp_path / "out"
    Dataset.from_list([json.loads(line) for line in data.read_text().splitlines()]).save_to_disk(str(folder))
    assert main([*command(folder, output, "--loss", "simpo"), "--steps", "1"]) == 0
    assert main([*command(folder, output, "--loss", "simpo", "--resume"), "--steps", "2"]) == 0
    (file,) = folder.glob("data-*.arrow")
    file.write_bytes(file.read_bytes().replace(b"red", b"tan"))
    assert main([*command(folder, output, "--loss", "simpo", "--resume"), "--steps", "3"]) == 2
    assert "its contents have changed" in capsys.readouterr().err
