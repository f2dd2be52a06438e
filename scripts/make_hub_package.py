"""Lay the operations out as the Hugging Face ``kernels`` library loads them: ``kernels.get_local_kernel(FOLDER)``.

python scripts/make_hub_package.py FOLDER

Losses, operations and Triton kernels, without trainers, tools and CUDA sources. The library gives a module a name of
its own and loads several versions side by side, so imports become relative, and the namespace of the operators holds
a hash of the sources. ``FOLDER`` gets a ``build.toml`` and, for a GPU and for a CPU, the same files in ``build/``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "fused_po"
# files of the package, and folders with all that they hold
PARTS = (
    *("__init__.py", "advantages.py", "distributed.py", "prices.py", "schedules.py", "segments.py", "splits.py"),
    "stats.py",
    *("kernels", "losses", "ops"),
)
# where a kernel needs a compiler of its own: a backend that can't be imported is passed over
LEFT_OUT = {"kernels/build.py", "kernels/cuda.py", "kernels/jit.py"}
BACKENDS = ("cuda", "cpu")
LICENSE = "Apache-2.0"
HUB_NAME = "fused-po"
# of the library's own builder
SETTINGS = f"""[general]
edition = 5
name = "{HUB_NAME}"
version = 1
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""


def sources(package: Path) -> dict[str, str]:
    """Text of each file, by its path in the package."""
    found = {}
    for part in PARTS:
        place = package / part
        for path in [place] if place.is_file() else sorted([*place.rglob("*.py"), *place.rglob("*.json")]):
            name = path.relative_to(package).as_posix()
            if name not in LEFT_OUT:
                found[name] = path.read_text(encoding="utf-8")
    return found


def made_relative(text: str, depth: int) -> str:
    """A module's text in which its imports of the package are relative; it lies ``depth`` folders deep in it."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == NAME for alias in node.names):
            raise ValueError(f"line {node.lineno}: write `from {NAME}... import`, which can be made relative")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == NAME:
            inner = (node.module or "")[len(NAME) + 1 :]
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * (depth + 1)}{inner} ", 1)
    return "".join(lines)


def renamed_operators(text: str, namespace: str) -> str:
    """A module's text in which the operators of the package are those of ``namespace``."""
    return re.sub(rf"\btorch\.ops\.{NAME}\b", f"torch.ops.{namespace}", text).replace(f'"{NAME}::', f'"{namespace}::')


def assemble(folder: Path, package: Path = ROOT / NAME) -> str:
    """Write the layout into ``folder``, which must be empty or absent.

    Returns:
        A hash of the sources. A module and the namespace of its operators are called ``_fused_po_BACKEND_HASH``.

    Raises:
        FileExistsError: ``folder`` holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    files = sources(package)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    for backend in BACKENDS:
        unique = f"_{NAME}_{backend}_{digest}"
        variant = folder / "build" / f"torch-{backend}"
        for name, text in files.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                text = renamed_operators(made_relative(text, name.count("/")), unique)
            path.write_text(text, encoding="utf-8")
        metadata = {
            "id": unique,
            "name": HUB_NAME,
            "version": 1,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / "build.toml").write_text(SETTINGS, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder)
    return digest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Lay the operations out for the Hugging Face kernels library.")
    parser.add_argument("folder", type=Path, help="an empty or absent folder")
    print(assemble(parser.parse_args().folder))
