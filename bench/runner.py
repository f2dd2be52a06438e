"""The command line of the benchmarks: case after case, the results so far in a JSON file."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from bench.measure import environment


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)
Result = dict[str, Any]


def main(
    description: str | None,
    cases: Callable[[str, bool], Sequence[C]],
    run: Callable[[C, str, float], Result],
    table: Callable[[Result], str],
) -> int:
    """Run the cases of a device.

    Args:
        description: for ``--help``.
        cases: those of a device, few of them where the second argument is True.
        run: measures a case on a device for about so many seconds; ArithmeticError where its results are wrong.
        table: a result in lines of text.

    Returns:
        the exit status: 1 if a case failed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few cases, small ones on a CPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to repeat each case")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--commit", help="recorded where git can't tell")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    report: Result = {"environment": environment(options.device, options.commit)}
    report |= {"results": [], "failed": {}, "left_out": []}
    print(json.dumps(report["environment"]))
    for case in cases(options.device, options.quick):
        if time.monotonic() - start > options.stop_after:
            report["left_out"].append(case.name)
            print(f"{case.name}: left out, no time", flush=True)
            continue
        try:
            result = run(case, options.device, options.seconds)
            report["results"].append(result)
            print(table(result), flush=True)
        except Exception as error:
            # the other cases still count
            report["failed"][case.name] = f"{type(error).__name__}: {error}"
            print(f"{case.name}: FAILED, {report['failed'][case.name]}", flush=True)
            if not isinstance(error, ArithmeticError):
                traceback.print_exc()
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return 1 if report["failed"] else 0
