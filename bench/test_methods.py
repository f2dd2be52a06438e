"""The cases of ``fused-po bench`` under pytest-benchmark, which has statistics and comparisons of its own.

    pytest bench --benchmark-only --cases quick --methods linear_loss trl

Methods do not take turns here; ``fused-po bench`` is what the figures in docs/ come from.
"""

from __future__ import annotations

import pytest
import torch

from fused_po.bench.accuracy import bounds, method_errors, rejected
from fused_po.bench.cases import Problem
from fused_po.bench.competitors import competitors
from fused_po.bench.measure import memory, step


@pytest.fixture(scope="module")
def problem(case, device):
    torch._dynamo.reset()
    return Problem(case, device)


def test_forward_and_backward(benchmark, problem, name, device):
    running, absent = competitors(problem, device, [name])
    if not running:
        pytest.skip(f"not run: {absent.get(name, 'not here')}")
    (method,) = running
    solved = method.problem(problem)
    truth, bound = bounds(solved)
    errors = method_errors(method, solved, truth)
    wrong = rejected(errors, bound)
    assert not (method.ours and wrong), wrong
    call = step(method, problem)

    def waited() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = solved.case.name
    benchmark.extra_info.update({"errors": errors, "over_bound": wrong, **memory(method, problem, device)})
    benchmark(waited)
