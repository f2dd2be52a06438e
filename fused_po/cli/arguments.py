"""Types of command-line arguments, and what commands have in common."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

__all__ = ["INTERRUPTED", "command_of", "memory_size", "positive"]

# the exit code after Ctrl-C
INTERRUPTED = 130


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


def command_of(arguments: argparse.Namespace, *without: str) -> str:
    """The command line that does the same again, into whatever folder.

    Args:
        without: names of arguments that are left out.
    """
    words = ["fused-po", arguments.command]
    for name, value in vars(arguments).items():
        if name in ("command", "run", "rest", "output", *without) or value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join([*words, "--output", "DIR"])


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def memory_size(text: str) -> int:
    """A type for ``argparse``: bytes, from ``80GiB``, ``512MB``, ``2.5G``, ``4096B`` (1024 each with an i or alone,
    else 1000).
    """
    found = re.fullmatch(r"([0-9.]+)\s*(?:([KMGT])(i?)(B?)|()()(B))", text.strip(), re.IGNORECASE)
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or number <= 0:
        raise argparse.ArgumentTypeError(f"a size of memory with its unit is wanted, such as 80GiB: got {text!r}")
    base = 1000 if found[4] and not found[3] else 1024
    return int(number * base ** _UNITS[(found[2] or "").upper()])
