"""How the CUDA extension is built, found and cached. Needs no GPU; what needs nvcc is skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest

from fused_po.kernels import build, jit
from fused_po.kernels.build import SUFFIX, BuildError, Recipe, Toolkit, ahead_of_time, find_nvcc
from tests.kernels.fake_nvcc import calls

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ("75", "80", "86", "90", "100", "120")
TOOLKIT = Toolkit(Path("/nowhere/nvcc"), "13.0.88", KNOWN)


def recipe(fake: Path) -> Recipe:
    toolkit = Toolkit.find()
    assert toolkit.nvcc == fake.parent / "nvcc"
    return Recipe(toolkit, ("80", "90"), build.find_sources())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, ("80", "90", "100", "120+PTX")),
        ("", ("80", "90", "100", "120+PTX")),
        ("8.0;9.0+PTX", ("80", "90+PTX")),
        ("9.0a", ("90a",)),
        ("12.0+PTX 8.0,9.0", ("80", "90", "120+PTX")),
        ("9.0;9.0+PTX; 8.0 ;", ("80", "90+PTX")),
        ("7.0;7.5;8.6", ("86",)),
        ("10.0f", ("100f",)),
    ],
)
def test_architectures(text, wanted):
    assert TOOLKIT.architectures(text) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hopper", "'Hopper' is not of the form"),
        ("8", "'8' is not of the form"),
        ("9.0+ptx", "'9.0\\+ptx' is not of the form"),
        ("9.0;sm_90", "'sm_90' is not of the form"),
        ("7.5", "no architecture from sm_80 on in '7.5'"),
        ("8.0;15.0", "nvcc 13.0.88 does not know sm_150"),
        (";", "is not of the form"),
    ],
)
def test_bad_architectures_are_refused_in_words(text, words):
    with pytest.raises(BuildError, match=words):
        TOOLKIT.architectures(text)


def test_an_older_nvcc_builds_what_it_knows_by_default():
    assert replace(TOOLKIT, codes=("80", "86", "90")).architectures() == ("80", "90+PTX")


def test_architectures_of_the_gpus_that_are_there():
    assert TOOLKIT.architectures_of([(9, 0), (9, 0), (8, 6)]) == ("86", "90")
    assert TOOLKIT.architectures_of([(10, 3)]) == ("100+PTX",)
    assert TOOLKIT.architectures_of([(7, 5), (8, 0)]) == ("80",)
    with pytest.raises(BuildError, match="no GPU here from sm_80 on"):
        TOOLKIT.architectures_of([(7, 5)])


def test_nvcc_is_found_in_its_places(fake, tmp_path, monkeypatch):
    assert find_nvcc() == fake.parent / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(fake.parent))
    assert find_nvcc() == fake.parent / "nvcc"
    monkeypatch.setenv("PATH", str(tmp_path))
    installed = tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc"
    installed.parent.mkdir(parents=True)
    (fake.parent / "nvcc").rename(installed)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site-packages")])
    assert find_nvcc() == installed


def test_ahead_of_time_by_request(fake, monkeypatch):
    for editable, request in ((False, None), (False, ""), (False, "1"), (True, "1")):
        made, line = ahead_of_time(request, editable)
        assert made is not None and made.architectures == ("80", "90", "100", "120+PTX")
        assert "with the CUDA extension: nvcc 13.0.88, sm_80, sm_90" in line
    assert ahead_of_time("0", False) == (None, "without the CUDA extension: FUSED_PO_BUILD_CUDA=0")
    made, line = ahead_of_time(None, editable=True)
    assert made is None and "first use" in line
    with pytest.raises(BuildError, match="FUSED_PO_BUILD_CUDA='yes': expected 1, 0 or nothing"):
        ahead_of_time("yes", False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert ahead_of_time(None, False)[0].architectures == ("90a",)


@pytest.mark.parametrize("missing", ["nvcc", "ninja", "pybind11", "architecture"])
def test_ahead_of_time_without_the_tools(missing, fake, monkeypatch):
    if missing == "nvcc":
        monkeypatch.setattr(build, "find_nvcc", lambda: None)
    elif missing == "ninja":
        monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    elif missing == "pybind11":
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    made, line = ahead_of_time(None, editable=False)
    assert made is None and line.startswith("without the CUDA extension: ") and missing in line
    with pytest.raises(BuildError, match=missing):
        ahead_of_time("1", editable=False)


def test_a_second_call_compiles_nothing(fake):
    first = jit.build_cached(recipe(fake))
    assert first.is_file() and first.name == f"_cuda{SUFFIX}"
    # two compilations and a link
    assert len(calls(fake)) == 3
    assert jit.build_cached(recipe(fake)) == first
    assert len(calls(fake)) == 3
    # nothing but the module and its lock
    cache = jit.cache_folder()
    assert sorted(path.name for path in cache.iterdir()) == sorted([first.parent.name, f"{first.parent.name}.lock"])


def test_the_cache_follows_what_a_build_depends_on(fake, monkeypatch):
    made = recipe(fake)
    keys = [made.key, replace(made, architectures=("80",)).key, replace(made, strict=True).key]
    keys.append(replace(made, toolkit=replace(made.toolkit, version="13.1.0")).key)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    keys.append(made.key)
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    header = made.sources / "rows.cuh"
    header.write_text("one")
    keys.append(replace(made).key)
    header.write_text("two")
    keys.append(replace(made).key)
    header.rename(made.sources / "other.cuh")
    keys.append(replace(made).key)
    assert len(set(keys)) == len(keys)
    # and on nothing else
    (made.sources / "other.cuh").unlink()
    (made.sources / "notes.md").write_text("words")
    assert replace(made).key == keys[0]


def test_libraries_of_the_toolkit_are_linked_where_pip_puts_them(fake, tmp_path):
    made = recipe(fake)
    made.build(tmp_path / "objects", tmp_path / f"module{SUFFIX}")
    link = next(call for call in calls(fake) if "-shared" in call)
    assert f"-L{fake.parents[1] / 'lib'}" in link


def test_a_compiler_that_refuses_is_asked_once(fake, monkeypatch):
    """Eight ranks, and the next run, are told the same without another try; what changes the build is tried at once."""
    made, tries = recipe(fake), []
    (made.sources / "rows.cu").write_text("broken\n")
    for _ in range(3):
        with pytest.raises(BuildError, match=r'nvcc 13.0.88 failed: rows.cu\(1\): error: identifier "broken"'):
            jit.build_cached(made)
        tries.append(len(calls(fake)))
    assert tries[0] == tries[1] == tries[2] > 0
    assert sorted(path.suffix for path in jit.cache_folder().iterdir()) == [".lock", ".refused"]
    with pytest.raises(BuildError, match=r"remembered: without .*\.refused it is tried again"):
        jit.build_cached(made)
    monkeypatch.setattr(jit, "FORGET_SECONDS", 0.0)
    with pytest.raises(BuildError, match="identifier"):
        jit.build_cached(made)
    assert len(calls(fake)) > tries[0]
    monkeypatch.undo()
    monkeypatch.setenv("FUSED_PO_CACHE", str(fake.parents[2] / "cache"))
    (made.sources / "rows.cu").write_text("rows\n")
    assert jit.build_cached(replace(made)).is_file()


@pytest.mark.parametrize(
    "words",
    [
        "fatal error: No space left on device",
        "nvcc error : died, Killed",
        "/usr/bin/ld: cannot find -lcudart_static: No such file\ncollect2: error: ld returned 1 exit status",
    ],
)
def test_what_passes_is_not_remembered(words, fake):
    made = recipe(fake)
    script = fake.with_name("nvcc").read_text()
    fake.with_name("nvcc").write_text(script.replace('if "broken"', f'sys.exit({words!r})\n        if "broken"'))
    with pytest.raises(BuildError, match=words):
        jit.build_cached(made)
    assert [path.suffix for path in jit.cache_folder().iterdir()] == [".lock"]
    fake.with_name("nvcc").write_text(script)
    assert jit.build_cached(made).is_file()


def test_without_a_home_directory(fake, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSED_PO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BuildError, match="there is no place for it .*home directory.*: set FUSED_PO_CACHE to a folder"):
        jit.build_cached(recipe(fake))


def test_a_file_system_without_locks(fake, monkeypatch):
    """One that says so, and one that never gives a lock."""
    made = recipe(fake)
    refuse = Mock(side_effect=NotImplementedError("FileSystem does not appear to support flock"))
    with monkeypatch.context() as patch:
        patch.setattr(filelock.FileLock, "acquire", refuse)
        with pytest.raises(BuildError, match="has no locks .*flock.*: set FUSED_PO_CACHE"):
            jit.build_cached(made)
    monkeypatch.setattr(jit, "SIGN_SECONDS", 0.05)
    lock = (jit.cache_folder() / made.key).with_suffix(".lock")
    with filelock.FileLock(lock):
        with pytest.raises(BuildError, match="can't be locked though nobody builds: set FUSED_PO_CACHE"):
            jit.build_cached(made)
        # as long as somebody does, it is waited for, but not for ever
        (jit.cache_folder() / f"{made.key}-other").mkdir()
        monkeypatch.setattr(jit, "LOCK_SECONDS", 0.2)
        with pytest.raises(BuildError, match="can't be locked though another process builds and does not end"):
            jit.build_cached(made)
    assert not calls(fake)


def test_two_processes_build_once(fake):
    made = recipe(fake)
    code = (
        "import sys; from pathlib import Path; from fused_po.kernels import build, jit;"
        "made = build.Recipe(build.Toolkit.find(), ('80', '90'), Path(sys.argv[1]));"
        "print(jit.build_cached(made))"
    )
    command = [sys.executable, "-c", code, str(made.sources)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert len(calls(fake)) == 3


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_PO_CACHE", str(tmp_path / "own"))
    assert jit.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FUSED_PO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "fused_po"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / ".cache" / "fused_po"


def test_a_cache_that_can_not_be_written_says_so(fake, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_PO_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="the cache folder .*file can't be used"):
        jit.build_cached(recipe(fake))


def test_building_at_the_first_use(fake, monkeypatch):
    monkeypatch.setattr(jit, "NAME", "fused_po._nothing_like_it")
    monkeypatch.setenv("FUSED_PO_JIT", "0")
    with pytest.raises(
        BuildError, match="it was not built ahead of time, and FUSED_PO_JIT=0 turns building it now off"
    ):
        jit.load_extension([(9, 0)])
    assert not calls(fake)
    monkeypatch.delenv("FUSED_PO_JIT")
    # the fake compiler writes no module
    with pytest.raises(BuildError, match="building it now failed: .*_cuda"):
        jit.load_extension([(9, 0)])
    assert any("sm_90" in call for call in calls(fake)) and not any("sm_80" in call for call in calls(fake))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(BuildError, match="it was not built ahead of time, and can't be built now: nvcc was not found"):
        jit.load_extension([(9, 0)])
