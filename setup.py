"""The CUDA extension, which fused_po/kernels/build.py builds; all metadata is in pyproject.toml.

``FUSED_PO_BUILD_CUDA`` unset builds it where nvcc is found, 1 fails without it, 0 leaves it out. No GPU is needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# by its path: neither the package nor torch need be installed
spec = importlib.util.spec_from_file_location("fused_po_build", ROOT / "fused_po" / "kernels" / "build.py")
recipes = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipes)

REQUEST = os.environ.get("FUSED_PO_BUILD_CUDA")
COMPILING = {"bdist_wheel", "build", "build_ext", "install"}
EDITABLE = {"develop", "editable_wheel"}


class ShipSources(build_py):
    """Puts csrc into the package, where a build at the first use finds it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "fused_po" / "csrc", dirs_exist_ok=True)


class BuildCuda(build_ext):
    """Hands the extension to the recipe."""

    def build_extension(self, ext: Extension) -> None:
        try:
            recipe.build(Path(self.build_temp), Path(self.get_ext_fullpath(ext.name)))
        except recipes.BuildError as error:
            if not ext.optional:
                raise SystemExit(f"fused_po: {error}") from None
            print(f"fused_po: without the CUDA extension: {error}", flush=True)


recipe = None
if (COMPILING | EDITABLE) & set(sys.argv):
    try:
        recipe, line = recipes.ahead_of_time(REQUEST, editable=bool(EDITABLE & set(sys.argv)))
    except recipes.BuildError as error:
        raise SystemExit(f"fused_po: {error}") from None
    print(f"fused_po: {line}", flush=True)

# optional unless asked for: the package works without
modules = [Extension("fused_po._cuda", [], optional=REQUEST != "1")] if recipe else []
setup(ext_modules=modules, cmdclass={"build_py": ShipSources, "build_ext": BuildCuda})
