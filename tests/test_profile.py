"""``fused-po profile``: what it predicts, what it measures, what it leaves out."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fused_po.cli import main
from fused_po.cli.arguments import memory_size
from fused_po.cli.profile_steps import HeadSteps, ModelSteps, measure

MIB = 1 << 20
COMMON = {"device": "cpu", "dtype": torch.float32, "scratch_bytes": None, "seed": 0}


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
        assert rows[route, 1048576]["status"] == "not run: does not fit, as predicted"
    assert found["largest_length"]["fused"] > 10 * found["largest_length"]["full_logits"] > 10_000
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "profile.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert "largest length predicted to fit" in capsys.readouterr().out


def test_a_whole_step_of_a_model():
    steps = ModelSteps("tiny", frozen=False, **COMMON)
    # a length far beyond those of the calibration
    for route in ("fused", "full_logits"):
        (row,) = measure(steps, route, [3000], 8 << 30, 1e9)
        assert abs(row["predicted_bytes"] - row["peak_bytes"]) <= 0.15 * row["peak_bytes"] + 4 * MIB
        assert sum(row["parts"].values()) == row["predicted_bytes"]


def test_a_model_with_a_table_of_positions_ends_where_it_does(tmp_path):
    size = {"n_positions": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path)
    steps = ModelSteps(str(tmp_path), frozen=False, **COMMON)
    assert steps.longest == 600 and steps.largest("fused", 8 << 30) == 600
    first, last = measure(steps, "fused", [600, 602], 8 << 30, 1e9)
    assert first["status"] == "measured"
    assert last["status"] == "not run: the model has positions for 600 tokens a pair"


def test_steps_longer_than_asked_are_not_run():
    steps = HeadSteps(16, 300, frozen=True, **COMMON)
    first, last = measure(steps, "fused", [64, 1 << 20], 8 << 30, 1e-3)
    assert first["status"] == "measured"
    assert last["seconds"] is None and "s a step" in last["status"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --hidden with --vocab, or --model"),
        (["--hidden", "8"], "either --hidden with --vocab, or --model"),
        (["--hidden", "8", "--vocab", "8", "--model", "tiny"], "either --hidden with --vocab, or --model"),
        (["--hidden", "8", "--vocab", "8", "--whole-step"], "--whole-step is of a --model"),
        (["--hidden", "8", "--vocab", "8", "--snapshot", "x.pickle", "--device", "cpu"], "CUDA allocator"),
    ],
)
def test_refusals(arguments, message, tmp_path, capsys):
    assert main(["profile", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 << 30), ("512M", 512 << 20), ("2.5GB", 2_500_000_000), ("1000", 1000)]
)
def test_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1.2.3M", "0"])
def test_sizes_that_are_none(text):
    with pytest.raises(Exception, match="80GiB"):
        memory_size(text)
