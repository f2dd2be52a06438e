"""Tests marked ``gpu`` are skipped, with the reason, where there is no GPU; ``pairwise`` ones are thinned."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from typing import IO, Any

import pytest

# the tensors of tests are small: threads would wait for each other, and for those of other workers; read by torch once
os.environ.setdefault("OMP_NUM_THREADS", "1")

# what other code has cached would hide what this code does
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="fused-po-")

import torch

from tests.pairwise import mark_the_rest

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# before anything imports triton: without a GPU its kernels are interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# before -m looks at the marks
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_the_rest(items)


def pytest_collection_finish() -> None:
    # trainers collect garbage at their end: what is imported by now stays, and need not be walked through each time
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; torch sees none")


@pytest.fixture
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are saved as one white point: painting them takes most of a report's time."""
    from matplotlib.figure import Figure
    from PIL import Image

    def savefig(figure: Figure, file: IO[Any], format: str, **options: Any) -> None:
        if format == "svg":
            file.write("<svg xmlns='http://www.w3.org/2000/svg'/>")
        else:
            Image.new("RGB", (1, 1), "white").save(file, format=format)

    monkeypatch.setattr(Figure, "savefig", savefig)
