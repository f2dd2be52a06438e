"""``fused-po bench``: time, memory and errors of this project's operations beside their peers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fused_po.cli.arguments import INTERRUPTED, positive
from fused_po.cli.progress import Watch, watched

__all__ = ["add_parser"]

_EPILOG = """\
Methods take turns within a case, with the bare matrix products of the same case; what is not installed, or cannot run
a case, is listed with the reason. Each result is compared with float64 first. The exit status is 1 if a result of this
project is over its bound (the case is not reported then) or a case failed. It ends with the time and memory of
the fused routes over torch eager's.
Cases: quick (default), full, targets, pairs, or names and patterns of names ('*dapo*'); --list prints them.
Methods: ours, peers, all, or names: linear_loss, linear_token_stats, token_stats, eager, compile, trl, liger,
liger_ce, cce, torch_lce, quack; 'linear_loss[triton]' names a backend that is not the first choice. The quick cases
take ours, eager and trl, and others where they are named.
--paper prices calls for a GPU that need not be there: every operation of this project's routes is counted on tensors
without values, TRL's on fake CUDA tensors (or read from what was counted before). --cases are then names of that table.
Where there is a GPU the same calls are measured beside it.
"""


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser(
        "bench",
        help="time and memory beside bare GEMMs, TRL, Liger and others",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", metavar="CASE", help="groups, names or patterns, default quick; with --paper all")
    add("--methods", nargs="+", metavar="METHOD", help="default: all; of quick: ours eager trl")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--seconds", type=positive(float), help="how long to repeat a case, default 6, quick 2; at least 5 turns")
    add("--stop-after", type=positive(float), default=1e9, metavar="SECONDS", help="begin no case after these")
    add("--commit", help="recorded; default what git says")
    add("--output", type=Path, metavar="FILE", help="JSON with all figures, written after each case")
    add("--paper", "--gpu", metavar="GPU", help="what cases cost on paper: a100, h100, h200 or b200")
    add("--json", action="store_true", help="with --paper: print JSON in place of a table")
    add("--lines", type=positive(int), metavar="COUNT", help="with --paper: also the dearest lines of each case")
    add("--list", action="store_true", help="print the cases and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, then measure.

    Returns:
        0, 1 if a case failed, 130 after Ctrl-C.

    Raises:
        ValueError: unknown cases or methods, or a device that is not there.
    """
    if arguments.paper is not None:
        if arguments.methods is not None or arguments.commit is not None:
            raise ValueError("--methods and --commit are of measurements: --paper shows all routes, and TRL's function")
        with watched("loading torch") as watch:
            return _on_paper(arguments, watch)
    if arguments.json or arguments.lines is not None:
        raise ValueError("--json and --lines go with --paper; --output FILE writes measurements as JSON")
    with watched("loading torch") as watch:
        return _measured(arguments, watch)


def _measured(arguments: argparse.Namespace, watch: Watch) -> int:
    import torch

    from fused_po.bench.cases import Case, choose, groups
    from fused_po.bench.compare import run_case, table
    from fused_po.bench.competitors import QUICK, check_names
    from fused_po.bench.runner import run_cases
    from fused_po.bench.summary import BEFORE, beside_eager, over_bound

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = choose(arguments.cases or ["quick"], device)
    if arguments.list:
        print(
            "\n".join(f"{group}:\n  " + "\n  ".join(c.name for c in found) for group, found in groups(device).items())
        )
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU; fused-po doctor says more")
    methods = arguments.methods
    quick = arguments.cases in (None, ["quick"])
    seconds = arguments.seconds or (2.0 if quick else 6.0)
    if methods is None and quick:
        methods = list(QUICK)
    elif methods is not None and "all" in methods:
        methods = None
    check_names(methods or ())
    _check_output(arguments.output)
    print(BEFORE[device])
    told: set[tuple[str, str]] = set()
    results: list[dict[str, Any]] = []

    def measure(case: Case) -> dict[str, Any]:
        watch.say(case.name)
        results.append(run_case(case, device, seconds, methods))
        return results[-1]

    code = INTERRUPTED
    try:
        code = run_cases(
            cases,
            measure,
            lambda result: table(result, told),
            device,
            output=arguments.output,
            commit=arguments.commit,
            stop_after=arguments.stop_after,
        )
    except KeyboardInterrupt:
        print("interrupted; the output holds the cases before")
    print("\n".join([*over_bound(results), *beside_eager(results)]))
    return code


def _on_paper(arguments: argparse.Namespace, watch: Watch) -> int:
    """The table on paper, and what is measured where there is a GPU."""
    from fused_po.bench.paper import CASES, choose
    from fused_po.bench.paper_table import report, show
    from fused_po.prices import device

    watch.say("pricing")
    on, cases = device(arguments.paper.lower()), choose(arguments.cases or ())
    if arguments.list:
        print("\n".join(CASES))
        return 0
    _check_output(arguments.output)
    seconds = 0.0 if arguments.device == "cpu" else arguments.seconds or 6.0
    found = report(cases, on, arguments.lines or 0, seconds)
    text = json.dumps(found, indent=1)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        show(found)
    return 0


def _check_output(output: Path | None) -> None:
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder: the name of a JSON file is wanted")
