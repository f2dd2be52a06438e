"""``fused-po profile``: what it predicts, what it measures, what it leaves out."""

from __future__ import annotations

import csv
import json
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fused_po.cli import main
from fused_po.cli.arguments import memory_size
from fused_po.cli.profile_measure import measure, predictions
from fused_po.cli.profile_report import length_words, memory_words, time_words
from fused_po.cli.profile_steps import HeadSteps, ModelSteps
from fused_po.cli.progress import Watch, watched
from fused_po.prices import device

MIB = 1 << 20
COMMON = {"device": "cpu", "dtype": torch.float32, "scratch_bytes": None, "seed": 0}


def rows_of(steps, lengths, memory=8 << 30, seconds=1e9):
    """Predicted and measured, as the command does."""
    rows = predictions(steps, lengths, memory)
    measure(steps, rows, seconds, Watch("", lambda watch: None))
    return rows


def test_a_head(tmp_path, capsys):
    options = ["--hidden", "32", "--vocab", "1500", "--device", "cpu", "--memory", "200MiB", "--output", str(tmp_path)]
    assert main(["profile", "--lengths", "512", "2048", "1048576", *options]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    rows = {(row["route"], row["length"]): row for row in found["rows"]}
    assert len(rows) == 6
    for route in ("fused", "full_logits"):
        for length in (512, 2048):
            row = rows[route, length]
            assert row["seconds"] > 0
            assert abs(row["predicted_bytes"] - row["peak_bytes"]) <= 0.15 * row["peak_bytes"] + 4 * MIB
            assert row["predicted_bytes"] == sum(row["parts"].values())
        assert rows[route, 1048576]["seconds"] is None
        assert rows[route, 1048576]["status"] == "does not fit, as predicted"
    assert found["largest_length"]["fused"] > 10 * found["largest_length"]["full_logits"] > 10_000
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "profile.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert "largest length predicted to fit" in capsys.readouterr().out


def test_a_whole_step_of_a_model():
    steps = ModelSteps("tiny", frozen=False, **COMMON)
    # a length far beyond those of the calibration
    rows = rows_of(steps, [3000])
    assert [row["route"] for row in rows] == ["fused", "full_logits"]
    for row in rows:
        assert abs(row["predicted_bytes"] - row["peak_bytes"]) <= 0.15 * row["peak_bytes"] + 4 * MIB
        assert sum(row["parts"].values()) == row["predicted_bytes"]


def test_a_model_with_a_table_of_positions_ends_where_it_does(tmp_path):
    size = {"n_positions": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path)
    steps = ModelSteps(str(tmp_path), frozen=False, **COMMON)
    assert steps.longest == 600 and steps.largest("fused", 8 << 30) == 600
    first, _, last, _ = rows_of(steps, [600, 602])
    assert first["status"] == "measured"
    assert last["status"] == "not run: the model has positions for 600 tokens a pair"


def test_what_would_take_longer_than_is_left_is_not_run():
    steps = HeadSteps(16, 300, frozen=True, **COMMON)
    first, _, last, _ = rows_of(steps, [64, 1 << 22], seconds=2.0)
    assert first["status"] == "measured"
    assert last["seconds"] is None and "of --seconds are left" in last["status"]
    # the first length of all too
    slow = HeadSteps(4096, 32000, frozen=True, **COMMON)
    slow.make = None
    rows = rows_of(slow, [1 << 14], seconds=0.1)
    assert all("of --seconds are left" in row["status"] for row in rows)


def test_what_does_not_fit_on_this_machine_is_not_run():
    steps = HeadSteps(16, 300, frozen=True, **COMMON)
    steps.make = None
    rows = rows_of(steps, [1 << 40], memory=1 << 60)
    assert [row["status"] for row in rows] == ["not run: more than is free on this machine"] * 2


def test_a_gpu_by_name(tmp_path, capsys):
    """Its dtype, memory and prices, on a machine that has none, and no step is run."""
    options = ["profile", "--hidden", "512", "--vocab", "32000", "--lengths", "1024", "65536"]
    seconds, capacity = {}, {}
    for name, option in (("h100", "--gpu"), ("H200", "--paper")):
        assert main([*options, option, name, "--output", str(tmp_path / name)]) == 0
        found = json.loads((tmp_path / name / "profile.json").read_text())
        assert found["device"] == f"on paper, {name.lower()}" and "bfloat16" in found["what"]
        assert all(row["seconds"] is None and row["paper_seconds"] > 0 for row in found["rows"])
        seconds[name.lower()] = [row["paper_seconds"] for row in found["rows"]]
        capacity[name.lower()] = found["memory_bytes"]
    assert capacity == {name: device(name).memory for name in capacity}
    assert all(new <= old for new, old in zip(seconds["h200"], seconds["h100"], strict=True))
    assert "on paper" in capsys.readouterr().out
    assert main([*options, "--gpu", "h1000", "--output", str(tmp_path / "x")]) == 2
    assert "no prices of 'h1000': wanted a100, h100" in capsys.readouterr().err


def test_predictions_alone(tmp_path, capsys):
    options = ["--hidden", "64", "--vocab", "3000", "--lengths", "1024", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["profile", "--predict-only", *options]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert [row["peak_bytes"] for row in found["rows"]] == [None, None]
    out, err = capsys.readouterr()
    assert "for the numbers of a GPU, name one: --gpu h100" in out
    assert "log-scaled" not in out + err
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_are_on_the_screen_before_anything_runs(tmp_path, capsys, monkeypatch):
    def look(*arguments):
        assert "largest length predicted to fit" in capsys.readouterr().out
        assert (tmp_path / "profile.csv").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("fused_po.cli.profile_measure.measure", look)
    options = ["--hidden", "64", "--vocab", "3000", "--lengths", "1024", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["profile", *options]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_words_on_axes():
    assert [length_words(n) for n in (512, 1024, 1536, 1 << 20)] == ["512", "1k", "1.5k", "1M"]
    assert [memory_words(n) for n in (100, 3 << 19, 5 << 30, 1010 << 20)] == ["100 B", "1.5 MiB", "5 GiB", "1010 MiB"]
    assert [time_words(s) for s in (2e-5, 0.012, 3.0)] == ["20 us", "12 ms", "3 s"]


def test_who_waits_hears_something(monkeypatch, capfd):
    monkeypatch.setattr("fused_po.cli.progress.QUIET", 0.05)
    with watched("sleeping", total=2.0) as watch:
        watch.say("still sleeping", 1.0)
        time.sleep(0.4)
    assert "... still sleeping, 50 %, 0 s" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --hidden with --vocab, or --model"),
        (["--hidden", "8"], "either --hidden with --vocab, or --model"),
        (["--hidden", "8", "--vocab", "8", "--model", "tiny"], "either --hidden with --vocab, or --model"),
        (["--hidden", "8", "--vocab", "8", "--whole-step"], "--whole-step is of a --model"),
        (["--hidden", "8", "--vocab", "8", "--gpu", "h100", "--device", "cpu"], "give one of them"),
        (["--model", "tiny", "--whole-step", "--gpu", "h100"], "on the device at hand: leave --gpu out"),
        (["--hidden", "8", "--vocab", "8", "--gpu", "h100", "--snapshot", "x"], "of a step that runs"),
        (["--hidden", "8", "--vocab", "8", "--snapshot", "x.pickle", "--device", "cpu"], "CUDA allocator"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    assert main(["profile", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("512M", 512 << 20), ("2.5GB", 2_500_000_000), ("1000B", 1000)]
)
def test_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1.2.3M", "0GiB", "80", "1000"])
def test_sizes_that_are_none(text):
    with pytest.raises(Exception, match="with its unit is wanted, such as 80GiB"):
        memory_size(text)
