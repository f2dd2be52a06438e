"""Write docs/tutorial.ipynb from docs/tutorial.md: python scripts/make_notebook.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
CODE = re.compile(r"^```python\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
# what a notebook server needs before the first cell
INSTALL = "This notebook needs `fused_po` installed where it runs (`pip install .` in a clone of the repository)."


def notebook(markdown: str) -> str:
    """The text of a notebook, version 4.5 of the format: a cell for each block of code and for the words between."""
    # words and code in turn, words first and last
    pieces = [piece.strip("\n") for piece in CODE.split(markdown)]
    # a page links pages beside it, the notebook included
    pieces[0] = pieces[0].replace("; [the same as a notebook](tutorial.ipynb)", "") + f"\n\n{INSTALL}"
    cells: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if piece:
            kind: dict[str, Any] = {"cell_type": "markdown"}
            if index % 2:
                kind = {"cell_type": "code", "execution_count": None, "outputs": []}
            cells.append({**kind, "id": f"cell-{index}", "metadata": {}, "source": piece.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (DOCS / "tutorial.ipynb").write_text(notebook((DOCS / "tutorial.md").read_text(encoding="utf-8")), encoding="utf-8")
