"""Options of ``pytest bench --benchmark-only``."""

from __future__ import annotations

import pytest
import torch

from fused_po.bench.cases import choose
from fused_po.bench.competitors import NAMES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused-po bench")
    group.addoption("--cases", nargs="+", default=["quick"], help="as of fused-po bench, default quick")
    group.addoption("--methods", nargs="+", default=list(NAMES), help="names of methods, default all")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    device = option("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        cases = choose(option("--cases"), device)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("device", [device], scope="module")
    metafunc.parametrize("case", cases, ids=lambda case: case.name, scope="module")
    metafunc.parametrize("name", option("--methods"))
