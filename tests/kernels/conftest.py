"""The CUDA extension as the tests build it: once, two architectures, warnings as errors; and a fake compiler."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from fused_po.kernels import jit
from fused_po.kernels.build import BuildError, Recipe, Toolkit, find_sources
from tests.kernels.fake_nvcc import fake

__all__ = ["cuda_build", "cuda_module", "fake"]


@pytest.fixture(scope="session")
def cuda_build(pytestconfig: pytest.Config) -> tuple[Recipe, Path]:
    """The recipe and the module for what differs most: before Hopper, where a kernel has no body, and from it on."""
    return build(pytestconfig, "8.0;9.0+PTX")


def build(pytestconfig: pytest.Config, architectures: str | None) -> tuple[Recipe, Path]:
    """For some architectures, None: all; kept in pytest's cache between runs. Skips where there is no nvcc."""
    try:
        toolkit = Toolkit.find()
    except BuildError as error:
        pytest.skip(f"the CUDA extension can't be built: {error}")
    sources = find_sources()
    assert sources is not None
    recipe = Recipe(toolkit, toolkit.architectures(architectures), sources, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_PO_CACHE", str(pytestconfig.cache.mkdir("cuda")))
        return recipe, jit.build_cached(recipe)


@pytest.fixture(scope="session")
def cuda_module(cuda_build: tuple[Recipe, Path]) -> ModuleType:
    return jit.load_from(cuda_build[1])
