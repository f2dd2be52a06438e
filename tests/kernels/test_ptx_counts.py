"""What a logit costs, counted by executing the machine code: bytes as promised, instructions no more than recorded."""

from __future__ import annotations

import pytest

from tests.kernels.ptx import unavailable_backend
from tests.kernels.ptx.count import FLOATS, Line, count, lines, recorded

needs_nvcc = pytest.mark.skipif(unavailable_backend("cuda-ptx") is not None, reason="needs nvcc and a C++ compiler")
# lane-instructions a logit of the CUDA kernels without softcap; with it, special functions apart, at most so many times
# as many
BUDGETS = {
    ("row_stats", "bf16"): 12,
    ("row_softmax", "bf16"): 25,
    ("row_grad", "bf16"): 20,
    ("row_stats", "fp32"): 16,
    ("row_softmax", "fp32"): 32,
    ("row_grad", "fp32"): 27,
}
SOFTCAP = 2.2
LINES = [
    *(pytest.param(line, marks=needs_nvcc, id=str(line).replace(" ", "-")) for line in lines("cuda")),
    *(pytest.param(line, id=str(line).replace(" ", "-")) for line in lines("triton")),
]


@pytest.mark.parametrize("line", LINES)
def test_no_kernel_costs_more_than_recorded(line: Line):
    """``python -m tests.kernels.ptx.count --write`` records; a kernel that costs more says why."""
    found, limit = count(line), recorded()[line]
    # labels, coefficients and the like are read once for thousands of logits
    size = FLOATS[line.element].itemsize
    passes = 2 if (line.backend, line.kernel) == ("triton", "row_softmax") else 1
    assert passes * size <= found.read <= 1.02 * passes * size
    written = 0 if line.kernel == "row_stats" else FLOATS[line.out].itemsize
    assert written <= found.written <= 1.001 * written
    # another version of a compiler may need one instruction more for some of them
    assert found.instructions <= limit.instructions + 0.2
    assert found.special <= limit.special + 0.1
    if line.backend == "cuda":
        budget = BUDGETS[line.kernel, line.element]
        assert found.instructions - line.softcap * found.special <= budget * (SOFTCAP if line.softcap else 1.0)


def test_the_record_is_complete():
    assert set(recorded()) == {*lines("cuda"), *lines("triton")}
