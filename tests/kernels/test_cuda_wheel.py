"""Wheels, editable installs and source distributions of the package, with and without the CUDA extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fused_po.kernels.build import SUFFIX
from tests.kernels.fake_nvcc import calls

ROOT = Path(__file__).resolve().parents[2]
HOOKS = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what a package is built from."""
    folder = tmp_path / "checkout"
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("fused_po", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def package(hook: str, checkout: Path, request: str | None, **more: str) -> subprocess.CompletedProcess[str]:
    """Call a hook of the build backend, as pip does."""
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_PO_BUILD_CUDA"}
    environment |= more if request is None else {**more, "FUSED_PO_BUILD_CUDA": request}
    target = checkout.parent / "dist"
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOOKS, hook, str(target)]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def wheel(checkout: Path) -> tuple[str, set[str]]:
    """Name and content of the one wheel."""
    (path,) = (checkout.parent / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, set(archive.namelist())


@pytest.mark.parametrize("request_", [None, "0", "1"])
def test_a_wheel(request_, fake, checkout):
    run = package("build_wheel", checkout, request_)
    assert run.returncode == 0, run.stderr
    name, files = wheel(checkout)
    # the sources are there either way, for a build at the first use
    assert {f"fused_po/csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()} <= files
    assert not any(name.startswith("csrc/") for name in files)
    if request_ == "0":
        assert "fused_po: without the CUDA extension: FUSED_PO_BUILD_CUDA=0" in run.stdout
        assert name.endswith("-py3-none-any.whl") and not calls(fake)
    else:
        assert "fused_po: with the CUDA extension: nvcc 13.0.88, sm_80, sm_90, sm_100, sm_120+PTX" in run.stdout
        assert not name.endswith("-any.whl") and f"fused_po/_cuda{SUFFIX}" in files


def test_a_wheel_of_broken_sources(fake, checkout):
    (checkout / "csrc" / "broken.cu").write_text("broken\n")
    run = package("build_wheel", checkout, "1")
    assert run.returncode != 0 and 'error: identifier "broken" is undefined' in run.stderr
    run = package("build_wheel", checkout, None)
    assert run.returncode == 0, run.stderr
    assert "without the CUDA extension: nvcc 13.0.88 failed: broken.cu(1): error" in run.stdout
    assert f"fused_po/_cuda{SUFFIX}" not in wheel(checkout)[1]


@pytest.mark.parametrize(("request_", "words"), [("1", "no architecture from sm_80 on"), ("maybe", "expected 1, 0")])
def test_a_wheel_that_can_not_be_built_as_asked(request_, words, fake, checkout):
    run = package("build_wheel", checkout, request_, TORCH_CUDA_ARCH_LIST="5.0")
    assert run.returncode != 0 and words in run.stderr


@pytest.mark.parametrize("request_", [None, "1"])
def test_an_editable_install_compiles_only_if_asked(request_, fake, checkout):
    run = package("build_editable", checkout, request_)
    assert run.returncode == 0, run.stderr
    assert (checkout / "fused_po" / f"_cuda{SUFFIX}").exists() == bool(calls(fake)) == (request_ == "1")
    assert not any("csrc" in name for name in wheel(checkout)[1])


def test_a_source_distribution_holds_the_sources(fake, checkout):
    run = package("build_sdist", checkout, "1")
    assert run.returncode == 0, run.stderr
    (path,) = (checkout.parent / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} | {"setup.py"} <= names
    assert not calls(fake)
