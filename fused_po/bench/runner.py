"""Case after case, the results so far in a JSON file."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fused_po.bench.measure import environment

__all__ = ["run_cases"]


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)
Result = dict[str, Any]


def run_cases(
    cases: Sequence[C],
    run: Callable[[C], Result],
    table: Callable[[Result], str],
    device: str,
    *,
    output: Path | None = None,
    commit: str | None = None,
    stop_after: float = float("inf"),
) -> int:
    """Run the cases one by one; one that fails does not stop the others.

    Args:
        run: one case.
        table: its result as lines of text.
        output: the JSON file, written anew after each case.
        commit: recorded; None: what git says.
        stop_after: seconds after which no case is begun.

    Returns:
        the exit status: 1 if a case failed.
    """
    start = time.monotonic()
    report: Result = {"environment": environment(device, commit), "results": [], "failed": {}, "left_out": []}
    print(json.dumps(report["environment"]))

    def save() -> None:
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for case in cases:
        if time.monotonic() - start > stop_after:
            report["left_out"].append(case.name)
            print(f"{case.name}: left out, no time", flush=True)
            save()
            continue
        try:
            result = run(case)
            report["results"].append(result)
            print(table(result), flush=True)
        except Exception as error:
            # the other cases still count
            report["failed"][case.name] = f"{type(error).__name__}: {error}"
            print(f"{case.name}: FAILED, {report['failed'][case.name]}", flush=True)
            if not isinstance(error, ArithmeticError):
                traceback.print_exc()
        save()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return 1 if report["failed"] else 0
