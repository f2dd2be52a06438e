"""A compiler that takes no time, for tests of how the CUDA extension is built."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from fused_po.kernels import build, jit

__all__ = ["calls", "fake"]

# answers as nvcc does, counts its runs, "compiles" by copying and fails on sources that hold the word broken
FAKE = """\
#!{python}
import pathlib, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Cuda compilation tools, release 13.0, V13.0.88")
elif arguments == ["--list-gpu-code"]:
    print("sm_80\\nsm_90\\nsm_100\\nsm_120")
else:
    here = pathlib.Path(__file__)
    with open(here.with_name("calls"), "a") as calls:
        calls.write(" ".join(arguments) + "\\n")
    target = arguments[arguments.index("-o") + 1]
    if "-c" in arguments:
        source = pathlib.Path(arguments[arguments.index("-c") + 1])
        if "broken" in source.read_text():
            sys.exit(f'{{source.name}}(1): error: identifier "broken" is undefined')
        pathlib.Path(target + ".d").write_text(f"{{target}}: {{source}}\\n")
    pathlib.Path(target).write_text("object")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A compiler that takes no time, two sources and an empty cache; gives the log of its runs."""
    home = tmp_path / "a cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(FAKE.format(python=sys.executable))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("FUSED_PO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    sources = tmp_path / "csrc $1"
    sources.mkdir()
    (sources / "bindings.cpp").write_text("bindings\n")
    (sources / "rows.cu").write_text("rows\n")
    monkeypatch.setattr(build, "find_sources", lambda: sources)
    monkeypatch.setattr(jit, "find_sources", lambda: sources)
    (nvcc.parent / "calls").touch()
    return nvcc.parent / "calls"


def calls(fake: Path) -> list[str]:
    """The arguments of each of its runs."""
    return fake.read_text().splitlines()
