"""``fused-po study`` as a command: its folder, what it pools, what fails, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from fused_po.cli import main
from fused_po.cli import study as command
from fused_po.cli.seeds import Outcome
from fused_po.study.real_settings import RealSettings
from fused_po.study.report import read_results
from fused_po.study.settings import Settings
from fused_po.study.store import Store
from tests.small_study import SMALL, small_results


@pytest.fixture
def results():
    return small_results()


def test_the_command(tmp_path, capsys, unpainted):
    small = [
        f"--{name.replace('_', '-')}={getattr(SMALL, name)}" for name in ("sft_steps", "steps", "pairs", "samples")
    ]
    output = tmp_path / "study"
    arguments = ["study", "--quick", *small, "--first-seed=3", "--workers=2", f"--output={output}"]
    assert main([*arguments, "--seeds=2"]) == 0
    said = capsys.readouterr()
    assert "smoke run: DPO follows stable targets" in said.out and "a first look, after one seed" in said.err
    assert {point.seed for point in read_results(output).points} == {3, 4}
    assert json.loads((output / "settings.json").read_text())["steps"] == SMALL.steps
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "fused-po study --seeds 2 --first-seed 3 --quick" in text and "A first look" not in text
    # seeds that are there are not run again, others join them
    before = (output / "seeds" / "3" / "points.csv").stat().st_mtime_ns
    assert main([*arguments, "--seeds=3"]) == 0
    assert (output / "seeds" / "3" / "points.csv").stat().st_mtime_ns == before
    assert {point.seed for point in read_results(output).points} == {3, 4, 5}
    # and those of other folders too
    other = tmp_path / "other"
    pooled = ["study", "--quick", *small, "--first-seed=6", "--seeds=1", f"--output={other}", "--pool", str(output)]
    assert main(pooled) == 0
    assert {point.seed for point in read_results(other).points} == {3, 4, 5, 6}
    assert Store(other, asdict(SMALL)).seeds() == [6]
    capsys.readouterr()
    assert main([*arguments, "--beta=0.2"]) == 2
    assert "other settings: beta is 0.1 there, 0.2 here" in capsys.readouterr().err
    assert main(["study", "--quick", f"--output={tmp_path / 'x'}", "--pool", str(tmp_path)]) == 2
    assert "is no study" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_seed_is_kept_whole_or_not_at_all(results, monkeypatch, tmp_path):
    store = Store(tmp_path, asdict(SMALL))
    store.open()
    store.write(7, results, 1.5)
    assert store.seeds() == [7] and store.read([7])[1] == 1.5
    monkeypatch.setattr("fused_po.study.store.os.replace", lambda *paths: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        store.write(8, results, 1.0)
    assert store.seeds() == [7] and [one.name for one in (tmp_path / "seeds").iterdir()] == ["7"]
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "file").touch()
    with pytest.raises(ValueError, match="neither empty nor a study"):
        Store(tmp_path / "y", asdict(SMALL)).open()


def test_ctrl_c_says_one_line_and_keeps_what_is_done(tmp_path):
    output = tmp_path / "study"
    given = [sys.executable, "-m", "fused_po", "study", "--quick", "--workers=2", "--seeds=40", "--steps=4"]
    given += ["--sft-steps=100", "--pairs=8", "--samples=8", f"--output={output}"]
    process = subprocess.Popen(
        given,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that run in the background of a shell ignore it, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not any((output / "seeds").glob("[0-9]*")) and process.poll() is None:
            time.sleep(0.2)
        # a terminal sends it to all processes
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    lines = [line for line in said.splitlines() if not line.startswith(("...", "a first look"))]
    assert len(lines) == 1 and lines[0].startswith("fused-po: interrupted; seeds that had ended are kept in"), said
    kept = Store(output, json.loads((output / "settings.json").read_text())).seeds()
    assert kept and read_results(output / "seeds" / str(kept[0])).points


def test_seeds_that_fail_are_left_out_and_named(results, monkeypatch, tmp_path, capsys, unpainted):
    failed = Outcome(1, FloatingPointError("the loss is nan; a smaller learning rate?"))

    def outcomes(seeds, work, workers, progress):
        yield failed
        if 0 in seeds:
            work.store.write(0, results, 1.0)
            yield Outcome(0, None)

    monkeypatch.setattr(command, "run_all", outcomes)
    assert main(["study", "--quick", "--first-seed=0", "--seeds=2", f"--output={tmp_path / 'a'}"]) == 1
    assert "seed 1 failed: the loss is nan" in capsys.readouterr().err
    for name in ("report.md", "report.html"):
        assert "the loss is nan; a smaller learning rate?" in (tmp_path / "a" / name).read_text(encoding="utf-8")
    assert {point.seed for point in read_results(tmp_path / "a").points} == {0}
    # nothing to report
    assert main(["study", "--quick", "--first-seed=1", "--seeds=1", f"--output={tmp_path / 'b'}"]) == 1
    assert not (tmp_path / "b" / "report.md").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device=nowhere"], "--device nowhere: "),
        (["--checkpoints=4"], "checkpoints must be at least 5"),
        (["--model=tiny"], "--model is of a study on a pretrained model: it wants --data"),
        (["--arms", "full"], "--arms is of a study on a pretrained model"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_training(options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "run_all", lambda *given: pytest.fail("a seed was started"))
    assert main(["study", *options, f"--output={tmp_path / 'x'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_help_says_the_defaults():
    small, real = Settings(), RealSettings("model", "data")
    for name, words in (command._COUNTS | command._RATES).items():
        field = name.replace("-", "_")
        shown = words.partition("default ")[2].split(" | ")
        of_real = real.lr(name[:3]) if name in ("dpo-lr", "ppo-lr") else getattr(real, field, None)
        assert [float(one) for one in shown] == [one for one in (getattr(small, field), of_real) if one is not None]


@pytest.mark.parametrize("option", ["--seeds=0", "--first-seed=-1", "--steps=-1", "--dpo-lr=nan", "--policy-loss=a2c"])
def test_bad_arguments(option, tmp_path):
    with pytest.raises(SystemExit):
        main(["study", option, f"--output={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()
