"""Tests marked ``gpu`` are skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# before anything imports triton: without a GPU its kernels are interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch sees none")
