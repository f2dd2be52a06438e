"""What the repository promises of itself: which module imports which, file sizes, a free import, the shipped data."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Container, Iterator
from pathlib import Path

import pytest
import torch

import fused_po
from fused_po import losses

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_po"
GENERATED = {"build", "dist", "bench-output", "demo-output"}

# names that the package itself gives
PUBLIC = set(fused_po.__all__)

# parts of the package, and other packages, that each part may import beside itself and the standard library
MAY_IMPORT = {
    "stats.py": {"torch"},
    "advantages.py": {"torch", "segments"},
    "segments.py": {"torch"},
    "losses": {"torch", "stats"},
    "schedules.py": set(),
    "splits.py": {"torch", "losses", "schedules"},
    "kernels": {"torch", "triton", "filelock", "stats"},
    "distributed.py": {"torch", "kernels"},
    "prices.py": {"torch"},
    "pictures.py": {"PIL"},
    "ops": {"torch", "distributed", "prices", "stats", "kernels", "losses", "splits"},
    # knows no operation: it sees whatever runs
    "ledger": {"torch", "triton", "prices"},
    "trainers": {
        *("torch", "transformers", "accelerate", "datasets", "tokenizers", "peft", "trl", "axolotl"),
        # its version, which cached references are kept by
        *("stats", "losses", "splits", "ops", "fused_po"),
    },
    "diagnostics": {
        *("torch", "transformers", "safetensors"),
        *("stats", "kernels", "ledger", "losses", "splits", "ops", "trainers"),
    },
    # a peer is imported by name, where it is installed
    "bench": {"torch", "rich", "losses", "kernels", "ledger", "ops", "prices", "diagnostics", "fused_po"} | PUBLIC,
    "study": {
        *("torch", "transformers", "tokenizers", "matplotlib", "numpy", "scipy", "statsmodels"),
        *("advantages", "losses", "splits", "ops", "pictures", "trainers", "diagnostics", "fused_po"),
        # of the study on pretrained models
        *("datasets", "peft", "trl", "ledger", "prices", "stats"),
    },
}


def sources(folder: Path) -> list[Path]:
    return [folder] if folder.suffix == ".py" else sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Names that ``path`` imports: of a part of this package the part, of anything else its package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import from fused_po on"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        else:
            continue
        for package, *parts in (name.split(".") for name in full):
            yield package if package != "fused_po" else parts[0] if parts else "fused_po"


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part: str) -> None:
    if not (PACKAGE / part).exists():
        pytest.skip(f"there is no {part} yet")
    allowed = {*MAY_IMPORT[part], part.removesuffix(".py"), *sys.stdlib_module_names}
    against = [f"{path}: {name}" for path in sources(PACKAGE / part) for name in imports(path) if name not in allowed]
    assert not against


def test_no_import_comes_round() -> None:
    """Nor one that waits for a call, or is for types alone."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(PACKAGE)}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    left = {name: imported(path, modules) - {name} for name, path in modules.items()}
    assert {"fused_po.ops.routes", "fused_po.prices"} < left["fused_po.ops.explain"]
    # they find public names when they are asked for, and name them for type checkers
    for package in ("fused_po", "fused_po.trainers.trl"):
        left[package] = set()
    # what imports nothing that is left, or is imported by nothing, has no part in a circle
    while free := {name for name in left if not left[name] & left.keys() or name not in set().union(*left.values())}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def imported(path: Path, modules: Container[str]) -> set[str]:
    """Those of ``modules`` that ``path`` imports: of ``from a import b`` a module ``a.b``, or else ``a``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else str(node.module) for name in full}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in modules}


def test_kernels_name_no_loss() -> None:
    # the loss `sigmoid` shares its name with a function that kernels may well use
    words = {"loss", "losses", *(name for name in losses.names() if not hasattr(torch, name))}
    for path in sources(PACKAGE / "kernels"):
        code = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        named = [f"{path}:{token.start[0]}: {token.string}" for token in code if token.string in words]
        assert not named


def test_no_file_is_longer_than_400_lines() -> None:
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in GENERATED]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*"))]
    code = [path for path in files if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".hpp", ".h"}]
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in code}
    assert lengths[__file__]
    assert not {path: length for path, length in lengths.items() if length > 400}


def test_importing_the_package_loads_nothing_heavy_and_warns_of_nothing() -> None:
    code = "import fused_po, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert "fused_po" in loaded
    assert not loaded & {"torch", "triton", "transformers", "matplotlib", "numpy", "rich"}
    assert not run.stderr


def test_public_names_are_found_listed_and_the_only_ones() -> None:
    assert set(fused_po.__all__) <= set(dir(fused_po))
    assert all(getattr(fused_po, name) is not None for name in fused_po.__all__)
    assert fused_po.losses is losses
    with pytest.raises(AttributeError, match="'no_such_name'"):
        _ = fused_po.no_such_name


def test_the_installed_version_is_the_one_of_the_source() -> None:
    try:
        installed = importlib.metadata.version("fused-po")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout: nothing is installed")
    assert installed == fused_po.__version__


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PACKAGE / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_shipped_preferences_are_what_their_script_writes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_preferences.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    made = sorted(tmp_path.iterdir())
    assert [path.name for path in made] == ["preferences.jsonl", "preferences_eval.jsonl"]
    for path in made:
        assert path.read_bytes() == (PACKAGE / "data" / path.name).read_bytes()


def test_shipped_preferences_are_distinct_and_of_mixed_length() -> None:
    train, held_out = rows("preferences.jsonl"), rows("preferences_eval.jsonl")
    both = train + held_out
    assert len(train) >= 64
    assert len(held_out) >= 16
    assert len({row["prompt"] for row in both}) == len(both)
    assert not {row["chosen"] for row in train} & {row["chosen"] for row in held_out}
    for row in both:
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert all(row.values())
        assert row["chosen"] != row["rejected"]
    for side in ("chosen", "rejected"):
        words = [len(row[side].split()) for row in train]
        # padding and masks are at work in nearly every batch
        assert min(words) < 10
        assert max(words) >= 100
