"""What is made for other installers: the layout that the Hugging Face kernels library loads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make_hub_package", ROOT / "scripts" / "make_hub_package.py")
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)

# beside the installed package in one process, and without it
USE = """
import json, sys
from pathlib import Path

import kernels
import torch
import torch.nn.functional as F

module = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
alone = not any(name.split(".")[0] == "fused_po" for name in sys.modules)
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
labels = torch.randint(0, 11, (4, 5), generator=generator)

def gradients(package):
    loss = package.losses.create("sigmoid", beta=0.1)
    half, zeros = package.splits.positive_only(), torch.zeros(4)
    out = package.linear_loss(hidden, weight, labels, loss, ref_logp=zeros, split=half)
    return torch.autograd.grad(out.loss, (hidden, weight))

ours = gradients(module)
logp = F.log_softmax(hidden @ weight.T, -1).gather(-1, labels[..., None]).squeeze(-1)
stats = module.linear_token_stats(hidden, weight, labels)
torch.testing.assert_close(stats.logp, logp)

import fused_po

for mine, theirs in zip(ours, gradients(fused_po), strict=True):
    assert torch.equal(mine, theirs) and mine.abs().sum() > 0
assert module.Stats is not fused_po.Stats
print(json.dumps({"name": module.__name__, "alone": alone}))
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "fused-po"
    hub.assemble(folder)
    return folder


def test_the_kernels_library_loads_it(layout):
    """In a process of its own: the operators of a namespace are defined once."""
    pytest.importorskip("kernels")
    run = subprocess.run(
        [sys.executable, "-c", USE, str(layout)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    metadata = json.loads((layout / "build" / "torch-cpu" / "metadata.json").read_text())
    assert told == {"name": metadata["id"], "alone": True}


def test_its_settings_are_those_of_the_kernel_builder(layout):
    Build = pytest.importorskip("kernels._rust").Build
    backends = {str(backend).lower() for backend in Build.open(layout).general.backends}
    assert backends == {path.name.removeprefix("torch-") for path in (layout / "build").iterdir()}


def test_nothing_in_it_leans_on_an_installed_package(layout):
    for path in (layout / "build" / "torch-cuda").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("from fused_po", "import fused_po")), f"{path}: {line}"
            assert "ops.fused_po" not in line and '"fused_po::' not in line, f"{path}: {line}"


def test_the_namespace_follows_the_sources(tmp_path):
    package = tmp_path / "fused_po"
    for name in hub.PARTS:
        if name.endswith(".py"):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text("")
    first = hub.assemble(tmp_path / "first", package)
    (package / "stats.py").write_text("x = 1\n")
    assert hub.assemble(tmp_path / "second", package) != first
    with pytest.raises(FileExistsError, match="second is not empty"):
        hub.assemble(tmp_path / "second", package)


@pytest.mark.parametrize(
    ("text", "depth", "wanted"),
    [
        ("from fused_po import losses\n", 0, "from . import losses\n"),
        ("from fused_po.stats import Stats\n", 1, "from ..stats import Stats\n"),
        ("if x:\n    from fused_po.a import (\n        b,\n    )\n", 1, "    from ..a import (\n        b,\n    )\n"),
        ("from fused_post import x\n", 1, "from fused_post import x\n"),
        ('"""from fused_po import x"""\n', 1, '"""from fused_po import x"""\n'),
    ],
)
def test_imports_become_relative(text, depth, wanted):
    assert hub.made_relative(text, depth).endswith(wanted)


def test_an_import_that_can_not_be_relative_is_refused():
    with pytest.raises(ValueError, match="line 2: write `from fused_po"):
        hub.made_relative("x = 1\nimport fused_po.stats\n", 1)
