"""What a run writes appears whole or not at all, whenever the run is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["add_line", "begin_lines", "begun", "json_lines", "put", "unfinished", "write_text", "writing"]

_ASIDE = ".incomplete-"


def write_text(path: Path, text: str) -> None:
    aside = unfinished(path)
    with writing(str(path)):
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)


def unfinished(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f"{_ASIDE}{path.name}")


def begun(folder: Path) -> bool:
    """Whether a folder is there and holds anything but what a kill left unfinished."""
    return folder.is_dir() and not all(one.name.startswith(_ASIDE) for one in folder.iterdir())


def put(folder: Path) -> None:
    """Give an unfinished folder its name."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished(folder), folder)


def json_lines(path: Path) -> list[Any]:
    """What the lines of a file say, but for a last one that was cut off; nothing where there is no file.

    Raises:
        ValueError: another line is not JSON.
    """
    found: list[Any] = []
    # other separators of lines may stand in strings
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON") from None
    return found


def begin_lines(path: Path) -> None:
    """What was cut off must not stand before the next line."""
    if path.exists():
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in json_lines(path)))


def add_line(path: Path, line: Any) -> None:
    """Add a line of JSON, which is on the disk afterwards."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


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
