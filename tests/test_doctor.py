"""``fused-po doctor``: what it prints, and that a wrong backend makes it fail."""

from __future__ import annotations

import json

import pytest
import torch

from fused_po import testing
from fused_po.cli import main
from fused_po.kernels import reference, select


@pytest.fixture(autouse=True)
def shipped(monkeypatch) -> None:
    """Only the backends of the package: other tests add their own."""
    monkeypatch.setattr(select, "BACKENDS", {name: select.BACKENDS[name] for name in ("cuda", "triton", "reference")})


def examined(capsys) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_backend_is_available_and_right_or_says_why_not(capsys):
    code, report = examined(capsys)
    assert code == 0
    assert set(report["backends"]) == set(select.BACKENDS)
    for backend in report["backends"].values():
        assert backend["available"] == (backend["reason"] is None) == bool(backend["checks"])
        assert all(check["passed"] and check["error"] <= check["bound"] for check in backend["checks"])
    assert report["backends"]["reference"]["passed"]
    assert report["versions"]["torch"] and report["versions"]["python"]
    assert report["extension"]["cache_folder"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_extension_says_so(capsys):
    _, report = examined(capsys)
    assert report["device"] == "cpu" and not report["gpus"]
    assert "GPU" in report["backends"]["cuda"]["reason"]
    assert report["extension"]["reason"] == "torch sees no CUDA GPU"


@pytest.mark.parametrize("how", ["wrong", "nan", "raises"])
def test_a_wrong_backend_fails(how, capsys, monkeypatch):
    right = reference.row_grad

    def wrong(*arguments):
        if how == "raises":
            raise RuntimeError("no kernel image is available")
        right(*arguments)
        arguments[-1].mul_(1.001 if how == "wrong" else torch.nan)

    monkeypatch.setattr(reference, "row_grad", wrong)
    code, report = examined(capsys)
    assert code == 1
    assert report["backends"]["reference"]["passed"] is False
    words = "RuntimeError: no kernel image is available" if how == "raises" else "over the bound: gradient"
    assert words in report["backends"]["reference"]["reason"]
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_tables_name_backends_and_versions(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*select.BACKENDS, "passed", "torch", "nvcc", "cache folder"))


def test_a_self_test_covers_all_three_kernels():
    names = {check.what.split(" (")[0] for check in testing.self_test("reference", "cpu")}
    assert names == {"logp", "entropy", "lse", "tile", "gradient"}
