"""Block sizes from runs of the tuner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import tune
from bench.tune import best, write
from fused_po.bench.rows import textbook
from fused_po.kernels import configs
from tests.interpreted import skip_unless_interpreted

ROOT = Path(__file__).resolve().parent.parent
FAST, SLOW = {"BLOCK": 8192, "num_warps": 16}, {"BLOCK": 1024, "num_warps": 4}


def run(fast: float, slow: float = 1.2, architecture: str = "sm_90", refused: bool = False) -> dict:
    """A run in which one kernel's candidates took these times of the default's."""
    times = {"default": {"ms": 2.0}, json.dumps(SLOW): {"ms": 2.0 * slow}}
    if not refused:
        times[json.dumps(FAST)] = {"ms": 2.0 * fast}
    result = {"kernel": "row_stats", "architecture": architecture, "times": times}
    others = [
        {"kernel": kernel, "architecture": architecture, "times": {"default": {"ms": 1.0}}}
        for kernel in ("row_softmax", "row_grad")
    ]
    return {"results": [result, *others]}


def test_the_fastest_over_all_runs_is_taken():
    assert best([run(0.8), run(0.9)]) == ("sm_90", {"row_stats": FAST})


@pytest.mark.parametrize("reports", [[run(0.99), run(0.985)], [run(0.7), run(1.5)], [run(0.7), run(0.7, refused=True)]])
def test_the_default_stays_where_nothing_is_faster_throughout(reports):
    assert best(reports) == ("sm_90", {})


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([run(0.5)], "two runs or more"),
        ([run(0.5), run(0.5, architecture="sm_80")], r"one architecture are wanted: got \['sm_80', 'sm_90'\]"),
        ([run(0.5, architecture="default")] * 2, "runs on GPUs"),
    ],
)
def test_refusals(reports, message):
    with pytest.raises(ValueError, match=message):
        best(reports)


def test_the_table_is_read_back(tmp_path, monkeypatch):
    target = tmp_path / "configs.json"
    target.write_text(configs.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    files = []
    for index, report in enumerate((run(0.8), run(0.9))):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(report), encoding="utf-8")
    write(files, target)
    monkeypatch.setattr(configs, "TABLE", target)
    configs._table.cache_clear()
    try:
        assert configs.block_and_warps("row_stats", 1 << 17, "sm_90") == (8192, 16)
        assert configs.block_and_warps("row_stats", 1 << 17, "sm_80") == (4096, 8)
        assert configs.block_and_warps("row_grad", 1 << 17, "sm_90") == (4096, 8)
        with configs.override("row_stats", SLOW):
            assert configs.block_and_warps("row_stats", 1 << 17, "sm_90") == (1024, 4)
        # a narrow row takes a block of its own width
        assert configs.block_and_warps("row_stats", 300, "sm_90") == (512, 2)
    finally:
        monkeypatch.undo()
        configs._table.cache_clear()


def test_a_kernel_that_writes_nothing_is_not_timed(monkeypatch):
    """Its results would be those of the candidate before."""

    def launch(kernel, problem):
        right = textbook(problem.x, problem.labels, "tile", problem.case.out)["tile"]
        once = iter([right])

        def call():
            problem.tile.copy_(next(once, problem.tile))
            return {"tile": problem.tile}

        return call

    monkeypatch.setattr(tune, "launch", launch)
    case = next(case for case in tune.cases("cpu") if case.kernel == "row_softmax")
    refused = tune.run(case, "cpu", 0.01)["refused"]
    assert list(refused) == [json.dumps(tune.candidates("cpu")[1])]
    assert "tile: nan" in refused[json.dumps(tune.candidates("cpu")[1])]


def test_a_run(tmp_path):
    """Interpreted: every candidate is held to the accuracy rule and timed."""
    skip_unless_interpreted()
    done = subprocess.run(
        [sys.executable, "-m", "bench.tune", "--device", "cpu", "--seconds", "0.01", "--output", tmp_path / "run.json"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert {result["kernel"] for result in report["results"]} == {"row_stats", "row_softmax", "row_grad"}
    for result in report["results"]:
        assert len(result["times"]) == 3 and not result["refused"]
        assert all(row["ms"] > 0 for row in result["times"].values())
