"""Types of command-line arguments."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["positive"]


def positive(kind: type) -> Any:
    """A type for ``argparse``: a number above 0 and finite."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a number is wanted, got {text!r}") from None
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    return parse
