"""Which line of a program an operation comes from."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch

__all__ = ["asking_line"]

_LIBRARY = sysconfig.get_path("stdlib") + "/"
_PACKAGES = Path(torch.__file__).parent.parent
# what only hands an operation on: torch, Triton, this package's ledger, code without a file
_HANDS_ON = (f"{_PACKAGES}/torch/", f"{_PACKAGES}/triton/", f"{Path(__file__).parent}/", "<")


def asking_line() -> str:
    """``folder/file:line`` of the innermost frame outside torch, Triton, the ledger and the standard library."""
    frame = sys._getframe(1)
    while True:
        name = frame.f_code.co_filename
        of_python = name.startswith(_LIBRARY) and "site-packages" not in name
        if not (of_python or name.startswith(_HANDS_ON)):
            return f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno}"
        if frame.f_back is None:
            return "?"
        frame = frame.f_back
