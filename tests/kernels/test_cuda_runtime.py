"""What the host side asks of the CUDA runtime, and how often: ``csrc/runtime.cu`` against a stand-in of CUDA.

It shows what is asked, not what hardware answers: no GPU takes part.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from tests.kernels.fiber import CSRC, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

HERE = Path(__file__).resolve().parent / "runtime"
# addresses that stand for kernels
KERNEL, OTHER = 0x1000, 0x2000
KIB = 1024


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("runtime") / "runtime.so"
    versions = ["-D__CUDA_ARCH_LIST__=900", "-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"]
    command = [str(compiler()), "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", *versions]
    command += ["-D__CUDACC_VER_BUILD__=88", f"-I{HERE}", f"-I{CSRC}", str(HERE / "driver.cpp")]
    run = subprocess.run(
        [*command, "-x", "c++", str(CSRC / "runtime.cu"), "-o", str(target)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return target


@pytest.fixture
def runtime(library, tmp_path) -> ctypes.CDLL:
    """A copy for each test, since what was asked is remembered."""
    own = tmp_path / "own.so"
    own.write_bytes(library.read_bytes())
    loaded = ctypes.CDLL(str(own))
    loaded.last_reason.restype = ctypes.c_char_p
    for function, numbers in ((loaded.code, 1), (loaded.fits, 3), (loaded.launch, 3)):
        function.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * numbers]
    return loaded


@pytest.mark.parametrize(("ptx", "code"), [(90, 90), (89, 89), (80, 80), (100, 90)])
def test_a_kernel_tells_what_it_was_compiled_for(runtime, ptx, code):
    """Code that the driver made of older PTX is of the GPU's binary version, and has none of the GPU's instructions."""
    runtime.told(ptx, 16, 0)
    assert [runtime.code(KERNEL, 0) for _ in range(3)] == [code] * 3
    assert runtime.calls(b"attributes") == 1


def test_shared_memory_is_asked_for_once_and_to_the_full(runtime):
    for shared in (60 * KIB, 200 * KIB, 100 * KIB):
        assert runtime.launch(KERNEL, 0, 1, shared)
    assert runtime.calls(b"shared") == 1
    # less what the kernel has of its own
    assert runtime.most_shared() == 227 * KIB - 256
    assert runtime.launch(OTHER, 0, 1, 60 * KIB)
    assert runtime.launch(KERNEL, 1, 1, 60 * KIB)
    assert (runtime.calls(b"shared"), runtime.calls(b"launch")) == (3, 5)


def test_a_launch_that_needs_nothing_asks_nothing(runtime):
    for _ in range(2):
        assert runtime.launch(KERNEL, 0, 1, 48 * KIB)
    assert not any(runtime.calls(name) for name in (b"shared", b"cluster", b"attributes", b"device"))


def test_a_cluster_fits_where_the_runtime_has_room_for_one(runtime):
    runtime.told(90, 4, 0)
    assert [runtime.fits(KERNEL, 0, cluster, KIB) for cluster in (1, 4, 8)] == [1, 1, 0]


def test_an_error_is_told_and_not_remembered(runtime):
    # so that the device is known
    assert runtime.fits(OTHER, 0, 1, KIB)
    runtime.told(90, 16, 1)
    assert not runtime.launch(KERNEL, 0, 1, 60 * KIB)
    assert runtime.last_reason() == b"a kernel of the test: as the stand-in was told"
    assert runtime.launch(KERNEL, 0, 1, 60 * KIB)
