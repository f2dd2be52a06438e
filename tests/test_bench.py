"""``fused-po bench``, its targets and the page of its results: what is measured, refused and reported."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import bench_cpu_vs_trl, readme, report
from bench.targets import targets
from fused_po.bench import competitors as of_cases
from fused_po.bench import measure, methods, peers
from fused_po.bench.accuracy import bounds, method_errors, rejected
from fused_po.bench.cases import Case, Problem, choose, groups
from fused_po.bench.compare import run_case
from fused_po.bench.objectives import OBJECTIVES
from fused_po.bench.summary import beside_eager, over_bound
from fused_po.cli import main

SMALL = Case(64, 16, 96, 16)


@pytest.mark.parametrize("given", ["trained", "frozen", "from_logits"])
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_method_agrees_with_float64_or_says_why_it_did_not_run(loss, given):
    frozen, logits = given == "frozen", given == "from_logits"
    problem = Problem(replace(SMALL, loss=loss, frozen=frozen, from_logits=logits), "cpu")
    before = None if problem.logits is None else problem.logits.detach().clone()
    # compiling takes longer than everything else, and runs the same functions
    wanted = [name for name in of_cases.NAMES if name != "compile"]
    running, absent = of_cases.competitors(problem, "cpu", wanted)
    assert {"token_stats", "eager"} <= {m.name for m in running}
    assert logits or {"linear_loss", "linear_token_stats"} <= {m.name for m in running}
    assert {m.name.split("[")[0] for m in running} | {name.split("[")[0] for name in absent} == set(wanted)
    for method in running:
        truth, bound = bounds(method.problem(problem))
        found = method_errors(method, method.problem(problem), truth)
        gradients = {"logits"} if logits else {"hidden"} if frozen else {"hidden", "weight"}
        assert found.keys() & {"logits", "hidden", "weight"} == gradients
        # a bound that lets anything pass would be none
        assert max(bound.values()) < 1e-5
        if method.ours:
            assert not rejected(found, bound)
        # peers round where they like
        assert max(found.values()) < 1e-4, method.name
    assert before is None or torch.equal(problem.logits, before)


def test_a_wrong_result_of_ours_is_not_reported(monkeypatch):
    right = methods.OURS["linear_loss"]

    def wrong(problem, backend=None):
        loss, logp = right(problem, backend)
        return 1.001 * loss, logp

    monkeypatch.setitem(methods.OURS, "linear_loss", wrong)
    with pytest.raises(ArithmeticError, match="linear_loss.*hidden"):
        run_case(SMALL, "cpu", 0.01, ["linear_loss", "eager"])


def test_a_peer_that_fails_is_listed_with_the_reason(monkeypatch):
    def broken(case, device):
        raise ImportError("no module of that name")

    monkeypatch.setitem(peers.PEERS, "trl", broken)
    result = run_case(SMALL, "cpu", 0.01, ["linear_loss", "trl"])
    assert result["absent"] == {"trl": "ImportError: no module of that name"}
    row = result["methods"]["linear_loss"]
    assert row["p20"] <= row["ms"] <= row["p80"] and row["repeats"] >= 3
    assert row["share_of_floor"] == pytest.approx(result["floor"]["ms"] / row["ms"])
    gradients = 4 * 16 * (64 + 96)
    assert row["peak_bytes"] - row["scratch_bytes"] == gradients


def test_a_first_look_says_when_fusing_pays(monkeypatch, capsys):
    """The small cases take what is done in seconds; what does not run is said once."""
    small = [SMALL, replace(SMALL, from_logits=True), replace(SMALL, frozen=True)]
    monkeypatch.setattr("fused_po.bench.cases.groups", lambda device: {"quick": small})
    assert main(["bench", "--device", "cpu", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    assert out.index("from about 4 million logits") < out.index(SMALL.name)
    assert "  compile " not in out and "  liger " not in out
    assert out.count("linear_loss[triton]") == 1 and out.count("the case starts from logits") == 3
    lines = out[out.index("Fused over torch eager:") :].splitlines()
    assert [line.split(", ")[1] for line in lines[1:4]] == ["linear_loss", "token_stats", "linear_loss"]


def test_time_and_memory_beside_eager():
    def row(ms, scratch, over=()):
        return {"ms": ms, "scratch_bytes": scratch, "over_bound": list(over)}

    shape = {"tokens": 1000, "vocab": 3000, "from_logits": False}
    both = {"linear_loss": row(2.0, 10), "eager": row(4.0, 40, ["hidden"])}
    alone = {"case": "b", "shape": shape, "methods": {"eager": both["eager"]}}
    (_, line) = beside_eager([{"case": "a", "shape": shape, "methods": both}, alone])
    assert line.startswith(
        "  0.50 x the time and 0.25 x the scratch, linear_loss, 3.0 million logits: a (eager is over"
    )
    assert beside_eager([alone]) == []
    (said,) = over_bound([alone])
    assert said.startswith("OVER THE BOUND: ") and "float64" in said
    assert over_bound([{"methods": {"eager": row(4.0, 40)}}]) == []


def test_the_command_writes_json_and_names_what_it_does_not_know(tmp_path, capsys):
    file = tmp_path / "out" / "ops.json"
    name = next(case.name for case in groups("cpu")["pairs"])
    options = ["--device", "cpu", "--methods", "linear_loss", "quack", "--seconds", "0.01", "--output", str(file)]
    assert main(["bench", "--cases", name, *options]) == 0
    found = json.loads(file.read_text())
    assert [result["case"] for result in found["results"]] == [name]
    assert list(found["results"][0]["methods"]) == ["linear_loss"]
    assert "mean cross entropy" in found["results"][0]["absent"]["quack"]
    assert main(["bench", "--device", "cpu", "--cases", "quik"]) == 2
    assert "near it: quick" in capsys.readouterr().err
    assert main(["bench", "--device", "cpu", "--methods", "liegr"]) == 2
    assert "no method 'liegr'" in capsys.readouterr().err
    assert main(["bench", "--device", "cpu", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "quick:" in listed and name in listed


def test_cases_that_were_left_out_are_written_down(tmp_path, capsys):
    file = tmp_path / "ops.json"
    assert main(["bench", "--device", "cpu", "--cases", "pairs", "--stop-after", "1e-9", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["results"] == [] and found["left_out"] == [case.name for case in groups("cpu")["pairs"]]
    # where a run is prepared
    assert main(["bench", "--device", "cuda", "--list"]) == 0
    assert groups("cuda")["targets"][0].name in capsys.readouterr().out


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    """And not of a repository in which its environment lies."""
    git = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    git(["git", "init"])
    git(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "other"])
    (tmp_path / "measure.py").touch()
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.environment("cpu")["commit"] is None
    assert measure.environment("cpu", "abc")["commit"] == "abc"


def test_patterns_choose_cases():
    frozen = choose(["*dapo*frozen*", "*dapo*frozen*"], "cpu")
    assert frozen and all(case.frozen and case.loss == "dapo" for case in frozen)
    assert len({case.name for case in frozen}) == len(frozen)
    with pytest.raises(ValueError, match="wanted quick, full, targets, pairs"):
        choose(["nothing like it"], "cuda")


def on_gpu(case: Case, times: dict[str, float], scratch: dict[str, int]) -> dict:
    rows = {
        name: {"ms": ms, "scratch_bytes": scratch[name], "tile_bytes": scratch[name], "ours": name == "linear_loss"}
        for name, ms in times.items()
    }
    return {"case": case.name, "floor": {"ms": 10.0}, "methods": rows}


def test_targets_hold_or_are_missed_or_were_not_run():
    known = groups("cuda")
    first, (short, long) = known["targets"][0], known["pairs"]
    results = {
        first.name: on_gpu(
            first,
            {"linear_loss": 11.0, "trl": 14.0, "eager": 12.0},
            dict.fromkeys(["linear_loss", "trl"], 1) | {"eager": 9},
        ),
        short.name: on_gpu(short, {"linear_loss": 1.0}, {"linear_loss": 1 << 30}),
        long.name: on_gpu(long, {"linear_loss": 1.0}, {"linear_loss": 5 << 28}),
    }
    found = {(t.what, t.limit): t for t in targets(results)}
    of_first = [t for (what, _), t in found.items() if what == first.name]
    # 1.10 of the floor; 1.09 of the fastest peer; 1.27 of TRL, eager takes too much memory to count
    assert [t.verdict for t in of_first] == ["holds", "holds", "MISSED"]
    assert "eager" in of_first[1].got and "TRL" in of_first[2].got
    assert [t.verdict for (what, _), t in found.items() if what == long.name] == ["holds", "MISSED"]
    assert {t.verdict for (what, _), t in found.items() if what not in results} == {"not run"}
    assert {t.verdict for t in targets({})} == {"not run"}


def test_checks_against_trl():
    result = {"methods": {"linear_loss": {"ms": 5.0, "scratch_bytes": 20}, "trl": {"ms": 10.0, "scratch_bytes": 100}}}
    assert [check["holds"] for check in bench_cpu_vs_trl.checks(result).values()] == [True, False]


def test_the_page_is_what_the_results_say(tmp_path, monkeypatch):
    (tmp_path / "performance").mkdir()
    monkeypatch.setattr(report, "DOCS", tmp_path)
    committed = (report.FOLDER.parent / "docs" / "performance.md").read_text()
    assert report.page() == committed, "run python -m bench.report"
    drawn = {plot.name: digest_in(plot) for plot in (tmp_path / "performance").iterdir()}
    folder = report.FOLDER.parent / "docs" / "performance"
    assert drawn == {plot.name: digest_in(plot) for plot in folder.iterdir()}, "run python -m bench.report"


def test_the_readme_shows_figures_of_the_results():
    measured = json.loads((report.RESULTS / "cpu_vs_trl.json").read_text())
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_block(text, measured) == text, "run python -m bench.report"
    with pytest.raises(ValueError, match="has no place for figures"):
        readme.with_block(text.replace(readme.LAST, ""), measured)


def digest_in(plot: Path) -> str:
    """What a plot says that it was drawn from; bytes differ with the version of matplotlib."""
    return Image.open(plot).text["Description"]


def test_tiles_are_what_is_neither_gradient_nor_accumulator():
    case = Case(512, 64, 6000, 128, dtype=torch.bfloat16, scratch_bytes=2 << 20)
    result = run_case(case, "cpu", 0.01, ["linear_loss", "linear_token_stats", "eager"])
    rows = result["methods"]
    for name in ("linear_loss", "linear_token_stats"):
        # dW in float32 is the larger part of what is above the gradients
        assert 1 << 20 <= rows[name]["tile_bytes"] <= (2 << 20) + (4 << 20)
        assert rows[name]["tile_bytes"] < rows[name]["scratch_bytes"]
    assert "tile_bytes" not in rows["eager"]
