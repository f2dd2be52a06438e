"""The CUDA extension itself, built by nvcc for every architecture; and the backend in front of it, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from fused_po.kernels import cuda, jit
from fused_po.kernels.build import BuildError, find_sources
from fused_po.kernels.contract import Coefficients, Span, Transform
from fused_po.kernels.select import select
from tests.kernels.conftest import build

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def cuobjdump() -> str:
    beside_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or str(beside_triton)


def resources(library: Path) -> list[tuple[str, str, int, int]]:
    """Architecture, kernel, registers and stack bytes of each kernel; a stack that is not 0 holds spilled registers."""
    report = subprocess.run([cuobjdump(), "--dump-resource-usage", library], capture_output=True, text=True, check=True)
    found, architecture = [], ""
    for line in report.stdout.splitlines():
        if named := re.search(r"arch = (sm_\w+)", line):
            architecture = named[1]
        elif named := re.search(r"Function (\w+):", line):
            kernel = named[1]
        elif used := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.append((architecture, kernel, int(used[1]), int(used[2])))
    return found


@pytest.mark.parametrize("architectures", ["those of the tests", pytest.param("all", marks=pytest.mark.nightly)])
def test_every_kernel_is_there_for_every_architecture_and_spills_nothing(architectures, cuda_build, pytestconfig):
    recipe, path = build(pytestconfig, None) if architectures == "all" else cuda_build
    found = resources(path)
    kernels = {architecture: set() for architecture, *_ in found}
    for architecture, kernel, *_ in found:
        kernels[architecture].add(kernel)
    assert set(kernels) == {f"sm_{name.removesuffix('+PTX')}" for name in recipe.architectures}
    assert all(names and names == kernels["sm_90"] for names in kernels.values())
    assert [row for row in found if row[-1]] == []


def test_it_tells_how_it_was_built(cuda_build, cuda_module):
    recipe, _ = cuda_build
    info = cuda_module.build_info()
    assert info["nvcc"] == recipe.toolkit.version
    assert f"architectures {','.join(recipe.architectures)} sources {recipe.source_hash} -O3" in info["flags"]
    assert cuda_module.architectures() == [f"sm_{name.removesuffix('+PTX')}" for name in recipe.architectures]


def test_older_code_ends_in_a_trap_where_it_can_not_do_the_work(cuda_build):
    """The resident kernel has no body before sm_90: started by mistake it must not pass for one that ran."""
    _, path = cuda_build
    listing = subprocess.run([cuobjdump(), "-sass", "-arch", "sm_80", path], capture_output=True, text=True, check=True)
    bodies = re.split(r"Function : ", listing.stdout)[1:]
    resident = [body for body in bodies if "resident" in body.split("\n")[0]]
    assert resident and all("BPT.TRAP" in body for body in resident)
    assert not any("BPT.TRAP" in body for body in bodies if body not in resident)


@without_a_gpu
def test_calls_without_a_gpu_answer_with_a_clear_error(cuda_module):
    assert cuda_module.device_count() == 0
    memory = torch.zeros(1024)
    pointer = memory.data_ptr()
    rows = (1, 8, 8)
    given = (pointer, 0, 1.0, 0.0, 1.0, 0, 8)
    for call in (
        lambda: cuda_module.row_stats(pointer, 0, *rows, *given, 1, pointer, 0, 0),
        lambda: cuda_module.row_softmax(pointer, 0, *rows, pointer, 0, 8, *given, 1, pointer, 0, 0),
        lambda: cuda_module.row_grad(pointer, 0, *rows, pointer, 0, 8, *given, pointer, pointer, 0, 0, 0, 0),
    ):
        with pytest.raises(RuntimeError, match=r"(?i)CUDA|GPU|device|driver"):
            call()
    assert not memory.any()


def test_a_runtime_newer_than_the_driver_is_told(monkeypatch):
    fake = SimpleNamespace(device_count=lambda: 0, build_info=lambda: {"nvcc": "13.0.88"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "load_extension", lambda capabilities: fake if capabilities == [(9, 0)] else None)
    module, reason = cuda.extension.__wrapped__()
    assert module is None and "the driver may be too old for CUDA 13.0.88" in reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BuildError("nvcc was not found"), "nvcc was not found"),
        (RuntimeError("Could not determine home directory."), "RuntimeError: Could not determine home directory."),
        (NotImplementedError("no flock"), "NotImplementedError: no flock"),
        (PermissionError(13, "denied"), "PermissionError: .*denied"),
    ],
)
def test_whatever_goes_wrong_leaves_the_choice_to_other_kernels(error, words, monkeypatch, caplog):
    def fail(capabilities):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "load_extension", fail)
    cuda.extension.cache_clear()
    cuda._unsupported_device.cache_clear()
    try:
        for _ in range(3):
            assert re.fullmatch(words, cuda.unsupported("row_stats", tensor_on_a_gpu()))
        with pytest.raises(RuntimeError, match="no CUDA kernels: "):
            cuda._module()
    finally:
        cuda.extension.cache_clear()
        cuda._unsupported_device.cache_clear()
    (record,) = [record for record in caplog.records if record.name == "fused_po"]
    assert record.levelname == "WARNING"
    assert re.search(f"no CUDA kernels, Triton's take their place: {words}", record.getMessage())


def test_a_module_of_other_sources_is_not_used(cuda_module, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib, "import_module", lambda name: cuda_module)
    assert jit.load_extension([(9, 0)]) is cuda_module
    (tmp_path / "bindings.cpp").write_text("changed")
    monkeypatch.setattr(jit, "find_sources", lambda: tmp_path)
    monkeypatch.setenv("FUSED_PO_JIT", "0")
    with pytest.raises(BuildError, match="the one built ahead of time is of other sources, and FUSED_PO_JIT=0"):
        jit.load_extension([(9, 0)])


@without_a_gpu
def test_without_a_gpu_the_backend_says_so():
    with pytest.raises(
        ValueError, match="backend 'cuda' can't run row_stats: it runs on a CUDA GPU, and the tensors are"
    ):
        select("row_stats", torch.zeros(2, 8), "cuda")
    assert cuda.extension() == (None, "torch sees no CUDA GPU")


def tensor_on_a_gpu(**more) -> SimpleNamespace:
    """As far as ``unsupported`` looks."""
    x = torch.zeros(2, 8, dtype=more.get("dtype", torch.bfloat16)).as_strided((2, 8), more.get("strides", (8, 1)))
    shape = more.get("shape", x.shape)
    return SimpleNamespace(is_cuda=True, dtype=x.dtype, shape=shape, stride=x.stride, get_device=lambda: 0)


@pytest.mark.parametrize(
    ("capability", "architectures", "words"),
    [
        ((9, 0), ["sm_80", "sm_90"], None),
        ((8, 9), ["sm_80"], None),
        ((12, 1), ["sm_90", "90+PTX"], None),
        ((7, 5), ["sm_80"], "a GPU of compute capability 7.5: the kernels need 8.0"),
        ((9, 0), ["sm_80"], "the extension was built for sm_80, not for this GPU's sm_90"),
        ((9, 0), ["sm_100", "100+PTX"], "the extension was built for sm_100, 100+PTX, not for this GPU's sm_90"),
    ],
)
def test_what_the_backend_refuses(capability, architectures, words, monkeypatch):
    code, ptx = ([name for name in architectures if ("+PTX" in name) == later] for later in (False, True))
    fake = SimpleNamespace(
        architectures=lambda: code, build_info=lambda: {"flags": f"architectures {','.join(ptx)} -O3"}
    )
    monkeypatch.setattr(cuda, "extension", lambda: (fake, None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    cuda._unsupported_device.cache_clear()
    try:
        assert cuda.unsupported("row_stats", tensor_on_a_gpu()) == words
        wide = cuda.unsupported("row_stats", tensor_on_a_gpu(dtype=torch.float64))
        assert wide == "torch.float64 is left to the reference"
        assert cuda.unsupported("row_grad", tensor_on_a_gpu(strides=(1, 2))) == "columns must be contiguous"
        assert "more than 1048576" in cuda.unsupported("row_grad", tensor_on_a_gpu(shape=(2, 2**20 + 1)))
    finally:
        cuda._unsupported_device.cache_clear()


def test_what_pointers_would_hide_is_refused():
    x, labels, ones = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), torch.ones(4)
    span, anchors = Span(0, 8), torch.zeros(4, 4)
    for wrong in (labels.int(), labels[:3], labels.unsqueeze(1)):
        with pytest.raises(ValueError, match="labels: got .* wanted \\(4,\\) torch.int64 on cpu"):
            cuda.row_stats(x, wrong, Transform(), span, ("logp",))
    with pytest.raises(ValueError, match="temperatures: got \\(4,\\) torch.float64"):
        cuda.row_stats(x, labels, Transform(temperatures=ones.double()), span, ("logp",))
    with pytest.raises(ValueError, match="9 classes do not fit 8 columns"):
        cuda.row_stats(x, labels, Transform(), Span(0, 9), ("logp",))
    for out in (x[:, :7], x.double(), torch.zeros(8, 4).t()):
        with pytest.raises(ValueError, match="out: got"):
            cuda.row_softmax(x, labels, Transform(), span, ("logp",), out)
        with pytest.raises(ValueError, match="out: got"):
            cuda.row_grad(x, labels, Transform(), span, anchors, Coefficients(ones), out)
    with pytest.raises(ValueError, match="anchors: got \\(3, 4\\)"):
        cuda.row_grad(x, labels, Transform(), span, anchors[:3], Coefficients(ones), x)
    with pytest.raises(ValueError, match="coefficients: got \\(1,\\)"):
        cuda.row_grad(x, labels, Transform(), span, anchors, Coefficients(ones[:1]), x)


def test_sources_are_found_in_a_checkout():
    assert find_sources() == Path(__file__).resolve().parents[2] / "csrc"
