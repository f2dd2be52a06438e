"""Files of a study that something else wrote, or that broke."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["reading"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a file of another form ends in.

    Raises:
        ValueError: that, with the path.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(f"{path} is not what a study wrote ({type(error).__name__}: {said})") from None
