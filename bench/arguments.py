"""What the programs of this folder are told, and how they go through their cases."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_po.bench.runner import run_cases

__all__ = ["parser_of", "run_all"]


def parser_of(text: str | None, seconds: float) -> argparse.ArgumentParser:
    """Options of all programs; ``seconds``: the default for a case."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=seconds, help="how long to repeat each case")
    add("--stop-after", type=float, default=math.inf, help="seconds after which no case is begun")
    add("--commit", help="recorded; default what git says")
    add("--output", type=Path, help="JSON, written after each case")
    return parser


def run_all(
    cases: Sequence[Any], run: Callable[..., dict[str, Any]], table: Callable[..., str], options: argparse.Namespace
) -> int:
    """Every case by ``run(case, device, seconds)``; returns the exit status."""
    return run_cases(
        cases,
        partial(run, device=options.device, seconds=options.seconds),
        table,
        options.device,
        output=options.output,
        commit=options.commit,
        stop_after=options.stop_after,
    )
