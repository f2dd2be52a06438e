"""The CUDA extension as the tests build it: every architecture, warnings as errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_po.kernels import jit
from fused_po.kernels.build import BuildError, Recipe, Toolkit, find_sources


def built_extension(cache: Path) -> tuple[Recipe, Path]:
    """The recipe and the module, built unless the same one is in the cache; skips where there is no nvcc."""
    try:
        toolkit = Toolkit.find()
    except BuildError as error:
        pytest.skip(f"the CUDA extension can't be built: {error}")
    sources = find_sources()
    assert sources is not None
    recipe = Recipe(toolkit, toolkit.architectures(), sources, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_PO_CACHE", str(cache))
        return recipe, jit.build_cached(recipe)
