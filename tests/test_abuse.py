"""``fused-po train`` on a full disk, in folders that can't be written or vanish: one sentence, checkpoints whole."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.killing import Runs
from tests.test_train import WORDS, small_model

# bytes: larger than the weights, smaller than the state of the optimizer
LIMIT = 150_000


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of two steps with a checkpoint at each, and what starts others."""
    folder = tmp_path_factory.mktemp("world")
    rows = [{"prompt": f"Is it {w}?", "chosen": f"Yes, {w}.", "rejected": "Go away."} for w in WORDS]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = Runs(folder)
    given = ["train", "--model", small_model(folder), "--data", str(data), "--batch-size", "2", "--save-every", "1"]
    assert runs.run([*given, "--steps", "2", "--output", str(folder / "done")])[0] == 0, runs.said()
    return runs, given, folder


@pytest.fixture
def begun(world, tmp_path):
    """The run, to be continued, in a folder of the test."""
    runs, given, folder = world
    output = tmp_path / "out"
    shutil.copytree(folder / "done", output)
    return runs, [*given, "--steps", "4", "--output", str(output), "--resume"], output


def refused(runs: Runs, argv: list[str], **how) -> str:
    code, *_ = runs.run(argv, **how)
    said = runs.said()
    assert code in (1, 2), (code, said)
    lines = [line for line in said.splitlines() if line.startswith("fused-po: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def assert_whole(output: Path, step: int) -> None:
    folder = output / f"checkpoint-{step}"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
    assert load_file(folder / "model.safetensors") and torch.load(folder / "optimizer.pt", weights_only=True)["state"]


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [100, 20_000, LIMIT])
def test_files_that_can_not_grow(begun, size):
    """Of the settings, the weights and the optimizer."""
    runs, argv, output = begun
    refused(runs, argv, harm=partial(limit_files, size))
    assert_whole(output, 2)
    assert runs.run(argv)[0] == 0, runs.said()
    assert_whole(output, 4)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
@pytest.mark.parametrize("size", ["900k", "1200k"])
def test_a_full_disk(world, tmp_path, size):
    runs, given, _ = world
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        argv = [*given, "--steps", "3", "--save-total-limit", "9", "--output", str(disk / "out")]
        said = refused(runs, argv)
        assert "o space left" in said or "can't be written" in said
        steps = sorted(int(one.name.rpartition("-")[2]) for one in (disk / "out").glob("checkpoint-*"))
        for step in steps:
            assert_whole(disk / "out", step)
        assert steps
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def without_rights() -> None:
    """Root writes anywhere, unless it lays down what lets it."""
    if os.geteuid() == 0:
        version, none = 0x20080522, 0
        header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)(*[none] * 6)
        assert ctypes.CDLL(None).capset(header, sets) == 0


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_can_not_be_written(begun, resume):
    runs, argv, output = begun
    argv = argv if resume else [*argv[:-2], str(output / "new")]
    output.chmod(0o555)
    try:
        said = refused(runs, argv, harm=without_rights)
    finally:
        output.chmod(0o755)
    assert "ermission denied" in said
    assert_whole(output, 2)
    assert not (output / "new").exists()


def test_data_that_vanished(begun):
    runs, argv, output = begun
    data = Path(argv[argv.index("--data") + 1])
    shutil.move(data, data.with_suffix(".away"))
    try:
        assert "pairs.jsonl: can't be read (no such file or folder)" in refused(runs, argv)
    finally:
        shutil.move(data.with_suffix(".away"), data)
    assert_whole(output, 2)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_an_output_folder_that_vanishes(world, share):
    """While it runs: it ends in one sentence, or with all that it was to write from then on."""
    runs, given, folder = world
    argv, output, whole = [*given, "--steps", "3", "--output"], folder / f"vanishes-{share}", folder / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    code, _, events = runs.run([*argv, str(whole)])
    assert code == 0
    code, *_ = runs.run([*argv, str(output)], event=int(share * events), harm=partial(shutil.rmtree, output, True))
    said = runs.said()
    if code == 0:
        assert load_file(output / "model" / "model.safetensors")
    else:
        assert code in (1, 2) and "Traceback" not in said, said
        assert sum(line.startswith("fused-po: ") for line in said.splitlines()) == 1, said
