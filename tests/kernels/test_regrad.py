"""``row_regrad``: G becomes dL/dx, against float64 autograd; and ``scale``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_po.kernels import library
from fused_po.kernels.contract import Coefficients, Span
from fused_po.testing import CASES, KernelCase
from tests.kernels.test_rows import check, coefficients, interpreted_or_skip, make, plain_grad, run_all

# wider tiles are never turned
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted"),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
]
UNCAPPED = [name for name, case in CASES.items() if case.make(torch.float32).transform.softcap is None]


def turned(problem, element: str, triple: Coefficients, backend: str) -> torch.Tensor:
    """dL/dx by way of a tile of an element type, as the operations on hidden states keep it."""
    span = Span(0, problem.vocab_size)
    _, anchors = run_all(problem, "reference")
    tile = torch.empty_like(problem.x, dtype=FLOATS[element])
    library.row_softmax(problem.x, problem.labels, problem.transform, span, ("logp",), tile, "reference")
    library.row_regrad(tile, problem.labels, problem.transform, span, anchors, triple, backend)
    return tile


@pytest.mark.pairwise(backend="reference")
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("which", ["e", "ce", "cel", "l"])
@pytest.mark.parametrize("case", UNCAPPED)
def test_gradient(case, which, element, backend, device):
    interpreted_or_skip(backend, device)
    problem = make(case, "fp32", device)
    triple = coefficients(problem.x.shape[0], device, which, torch.float32)
    truth = plain_grad(problem, torch.float64, triple)
    # logits and all that follows in the dtype of the tile, as a model's own head would have it
    naive = plain_grad(replace(problem, x=problem.x.to(FLOATS[element])), FLOATS[element], triple)
    out = turned(problem, element, triple, backend)
    check(out[:, : problem.vocab_size], naive, truth, "dL/dx")
    assert (out[:, problem.vocab_size :] == 0).all()


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_the_slope_of_rows_with_a_temperature_and_a_logit_scale(backend, device):
    """It is the logit scale over the temperature of the row, and neither is 1."""
    interpreted_or_skip(backend, device)
    problem = KernelCase(5, 300, row_temperatures=True, logit_scale=1.5).make(torch.float32, device)
    triple = coefficients(problem.x.shape[0], device, "cel", torch.float32)
    naive = plain_grad(replace(problem, x=problem.x.to(torch.bfloat16)), torch.bfloat16, triple)
    truth = plain_grad(problem, torch.float64, triple)
    check(turned(problem, "bf16", triple, backend), naive, truth, "dL/dx")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_ignored_rows_and_strides(backend, device):
    interpreted_or_skip(backend, device)
    problem = make("usual", "fp32", device)
    triple = coefficients(problem.x.shape[0], device, "cel", torch.float32)
    want = turned(problem, "bf16", triple, backend)
    memory = torch.full((problem.x.shape[0], problem.x.shape[1] + 5), torch.nan, dtype=torch.bfloat16, device=device)
    tile = memory[:, 3:-2]
    _, anchors = run_all(problem, "reference")
    span = Span(0, problem.vocab_size)
    library.row_softmax(problem.x, problem.labels, problem.transform, span, ("logp",), tile, "reference")
    problem.labels[2] = -100
    tile[2] = torch.nan
    library.row_regrad(tile, problem.labels, problem.transform, span, anchors, triple, backend)
    assert (tile[2] == 0).all()
    rest = [row for row in range(tile.shape[0]) if row != 2]
    assert torch.equal(tile[rest], want[rest])
    assert memory[:, :3].isnan().all() and memory[:, -2:].isnan().all()


def test_a_softcap_hides_the_probabilities_from_a_named_backend():
    x = torch.zeros(1, 4)
    arguments = (torch.zeros(1, dtype=torch.int64), CASES["flat"].make(torch.float32).transform, Span(0, 4))
    with pytest.raises(ValueError, match="'cuda' has no row_regrad"):
        library.row_regrad(x, *arguments, torch.zeros(4, 1), Coefficients(torch.ones(1)), "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("factor", [1.0, 0.37, -2.0, torch.nan])
def test_scale(factor, element, device):
    x = torch.randn(3, 9000, device=device).to({"fp32": torch.float32, **FLOATS}[element])
    want = x * torch.tensor(factor, device=device)
    library.scale(x, torch.tensor(factor, device=device))
    torch.testing.assert_close(x, want.to(x.dtype), rtol=0, atol=0, equal_nan=True)
    library.scale(x[:0], torch.tensor(factor, device=device))
