"""The documentation as a site: its pages and links, the tutorial and its notebook, the size of what the tree holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import python

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))
import make_notebook  # noqa: E402

FIGURES = {".png", ".svg"}


def run(command: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **more}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_the_tutorial_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "tutorial.py").write_text("\n".join(blocks))
    done = python("tutorial.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # the page says what is printed here
    assert done.stdout.splitlines()[:2] == ["DPO loss 0.6931", "same loss, same gradients"]


def test_the_notebook_is_the_tutorial():
    text = (DOCS / "tutorial.ipynb").read_text()
    page = (DOCS / "tutorial.md").read_text()
    assert text == make_notebook.notebook(page), "run python scripts/make_notebook.py"
    code = ["".join(cell["source"]) + "\n" for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert code == re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_site_builds_without_a_warning(tmp_path):
    """Broken links, anchors and names in the reference are warnings, and warnings are errors."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = run(command, ROOT, NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "site" / "reference.html").read_text()
    # a public name with what its docstring says of an argument
    assert 'id="fused_po.ops.linear_loss.linear_loss"' in reference and "scratch_bytes" in reference
    start = (tmp_path / "site" / "index.html").read_text()
    assert 'href="guides/pytorch.html"' in start and 'href="docs/' not in start
    # a page asks no other host for anything
    assert not re.findall(r'<(?:link|script|img)[^>]+(?:src|href)="https?:', start)


def test_no_page_or_figure_is_large():
    sizes = {path: path.stat().st_size for path in DOCS.rglob("*") if path.is_file()}
    assert not {path for path, size in sizes.items() if size > (60_000 if path.suffix in FIGURES else 100_000)}


def test_the_tree_holds_text_and_not_drawings():
    assert not list(DOCS.rglob("*.svg"))
