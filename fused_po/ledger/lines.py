"""Which line of a program an operation comes from."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["asking_line"]

_PACKAGE = str(Path(__file__).parent.parent) + "/"
_OWN = (str(Path(__file__).parent) + "/",)
_TORCH = str(Path(torch.__file__).parent) + "/"


def asking_line() -> str:
    """``file:line`` of the innermost frame of this package outside the ledger, else of the innermost outside torch."""
    frame, other = sys._getframe(1), "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN):
            if name.startswith(_PACKAGE):
                return f"{name.removeprefix(_PACKAGE)}:{frame.f_lineno}"
            if other == "?" and not name.startswith((_TORCH, "<")):
                other = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return other
