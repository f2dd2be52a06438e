"""The operators in front of the backends: opcheck, selection, and the reasons in words."""

from __future__ import annotations

import logging

import pytest
import torch

from fused_po.kernels import library  # noqa: F401  registers the operators
from fused_po.kernels import select as selection
from fused_po.kernels.select import select
from tests.interpreted import skip_unless_interpreted

LABELS = torch.tensor([3, 0, -100, 6])
TRANSFORM = (torch.tensor([1.0, 0.5, 2.0, 1.0]), 1.0, 9.0, 1.2)
SPAN = (0, 7)
ROWS = torch.tensor([-1.0, -2.0, -0.5, -3.0])
ANCHORS = torch.stack([ROWS, ROWS.abs(), ROWS, ROWS.abs()])


def logits() -> torch.Tensor:
    return torch.randn(4, 8)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("row_stats", lambda: (logits(), LABELS, *TRANSFORM, *SPAN, "logp,entropy", None)),
        ("row_softmax_", lambda: (logits(), LABELS, *TRANSFORM, *SPAN, "logp", None)),
        ("row_softmax_into", lambda: (logits(), logits().bfloat16(), LABELS, *TRANSFORM, *SPAN, "logp", None)),
        ("row_grad_", lambda: (logits(), LABELS, *TRANSFORM, *SPAN, ANCHORS, ROWS, ROWS, ROWS, None)),
        ("row_grad_", lambda: (logits(), LABELS, *TRANSFORM, *SPAN, ANCHORS, ROWS, None, None, None)),
        ("row_grad_into", lambda: (logits(), logits(), LABELS, *TRANSFORM, *SPAN, ANCHORS, *[ROWS] * 3, None)),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(operator, arguments, backend):
    if backend == "triton":
        skip_unless_interpreted()
    given = (*arguments()[:-1], backend)
    torch.library.opcheck(getattr(torch.ops.fused_po, operator), given)


def test_a_cpu_tensor_runs_on_the_reference_unless_asked():
    assert select("row_stats", logits(), None).__name__ == "fused_po.kernels.reference"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cudda': expected one of cuda, triton, reference"):
        select("row_stats", logits(), "cudda")


def test_a_named_backend_never_falls_back():
    with pytest.raises(
        ValueError, match=r"backend 'triton' can't run row_grad: torch.float64 is left to the reference"
    ):
        select("row_grad", logits().double(), "triton")
    with pytest.raises(ValueError, match="columns must be contiguous"):
        select("row_stats", logits().t(), "triton")


def test_the_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("FUSED_PO_BACKEND", "triton")
    with pytest.raises(ValueError, match="backend 'triton' can't run"):
        select("row_stats", logits().double(), None)
    assert select("row_stats", logits(), "reference").__name__.endswith("reference")


def test_a_backend_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(selection.BACKENDS, "triton", "fused_po.kernels.absent")
    selection._load.cache_clear()
    try:
        with pytest.raises(ValueError, match="backend 'triton' can't run row_stats: it can't be imported"):
            select("row_stats", logits(), "triton")
        assert select("row_stats", logits(), None).__name__.endswith("reference")
    finally:
        selection._load.cache_clear()


def test_the_choice_is_logged_once(caplog):
    selection._announce.cache_clear()
    with caplog.at_level(logging.INFO, "fused_po"):
        for _ in range(3):
            select("row_stats", logits(), None)
    assert [record.getMessage() for record in caplog.records] == ["fused_po: reference kernels on cpu"]
