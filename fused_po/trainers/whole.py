"""What a run writes appears whole or not at all, whenever the run is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["put", "unfinished", "write_text", "writing"]


def write_text(path: Path, text: str) -> None:
    aside = unfinished(path)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def unfinished(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f".incomplete-{path.name}")


def put(folder: Path) -> None:
    """Give an unfinished folder its name."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished(folder), folder)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Within, weights and states are written; what their writers say of a full disk has no common base.

    Raises:
        OSError: they can't be.
    """
    try:
        yield
    except ArithmeticError:
        # of training that diverged
        raise
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{what} can't be written: {said}") from error
