"""What ``Plan.explain`` says is what a call does."""

from __future__ import annotations

import pytest
import torch

from fused_po import make_plan
from fused_po.bench.paper import CASES, sheet
from fused_po.ops.costs import PRICES
from fused_po.ops.explain import explain, usual_route
from fused_po.ops.peaks import peak
from fused_po.ops.routes import Route

# gradients through logp alone
PRICED = [name for name, case in CASES.items() if not (case.entropy or "entropy" in case.loss)]


def route_of(name: str) -> Route:
    case = CASES[name]
    stored = torch.float32 if case.autocast else case.dtype
    shape = (case.tokens, case.hidden, case.vocab)
    return usual_route(*shape, case.method == "linear_loss", case.dtype, stored, not case.frozen, "cuda", None)


@pytest.mark.parametrize("name", PRICED)
def test_the_price_and_the_memory_are_those_of_the_operations_of_the_call(name):
    case, found, route = CASES[name], sheet(CASES[name]), route_of(name)
    fused = case.method == "linear_loss"
    priced = sum(route.seconds(case.tokens, fused=fused).values())
    # pairs fill a chunk less than tokens do
    assert priced == pytest.approx(found.ledger.seconds(PRICES), rel=0.05 if case.loss == "dpo" else 0.03)
    most = peak(route, case.tokens, fused=fused, plain=True, widens=False)
    stored = 4 if case.autocast else case.dtype.itemsize
    returned = stored * case.hidden * (case.tokens + (0 if case.frozen else case.vocab))
    assert most.total - returned == pytest.approx(found.scratch, rel=0.1, abs=100 << 20)


def test_the_route_in_words():
    text = explain(8192, 4096, 131072)
    assert "all rows keep their gradient tile" in text and "written once: 3 products" in text
    assert "wait for backward" in explain(512, 4096, 131072)
    assert "chunks of at most" in explain(131072, 4096, 131072)
    assert "made again in backward" in explain(65536, 4096, 131072, operation="linear_token_stats")
    assert "2 products" in explain(8192, 4096, 131072, trainable=False)
    assert "a copy of the weight in bfloat16, 1.00 GiB" in explain(8192, 4096, 131072, weight_dtype=torch.float32)
    plan = make_plan(torch.tensor([[1, -100, 2, 3]]))
    assert plan.explain(16, 37, dtype=torch.float32, device="cpu").startswith("3 rows, H = 16, V = 37")


def test_prices_are_those_of_the_named_gpu():
    h100, h200, cuda = (explain(8192, 4096, 131072, device=name) for name in ("H100", "h200", "cuda"))
    assert "on paper, h100: " in h100 and h200 == cuda
    # another price for the same route
    assert [line for line in h100.splitlines() if " ms" not in line] == [
        line for line in h200.splitlines() if " ms" not in line
    ]
    assert h100 != h200


def test_a_plan_without_a_loss_token_says_so():
    plan = make_plan(torch.full((2, 3), -100))
    assert plan.explain(16, 37) == "0 rows: no label carries loss, so the head is not run"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"hidden_size": 8.0},
        {"vocab_size": "37"},
        {"vocab_size": 0},
        {"device": "h1000"},
        {"operation": "magic"},
        {"dtype": "bfloat16"},
        {"scratch_bytes": -5},
    ],
)
def test_refusals(change):
    with pytest.raises(ValueError, match="must"):
        explain(**({"rows": 4, "hidden_size": 4, "vocab_size": 4} | change))
