"""DPO, DAPO and DPO with a frozen head on a CPU against TRL's chunked log-probs in the same run: time, and memory above
inputs and gradients, with targets.

    python -m bench.bench_cpu_vs_trl --output bench/results/cpu_vs_trl.json

The exit status is 0 if every target holds, 1 if one is missed or a result is wrong, 2 if TRL can't be run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fused_po.bench.cases import Case, Problem
from fused_po.bench.compare import run_case, table
from fused_po.bench.measure import environment, memory
from fused_po.bench.methods import competitors

MIB = 1 << 20
# of TRL's time and memory, and of the memory at the shorter length
MOST_TIME, MOST_MEMORY, MOST_GROWTH, MOST_GROWTH_BYTES = 0.60, 0.15, 1.10, 8 * MIB
METHODS = ("linear_loss", "linear_token_stats", "eager", "trl")

Checks = dict[str, dict[str, Any]]


def checks(result: dict[str, Any]) -> Checks:
    """This project's time and memory over TRL's."""
    ours, trl = result["methods"]["linear_loss"], result["methods"]["trl"]
    return {
        "time": check(ours["ms"] / trl["ms"], MOST_TIME),
        "memory": check(ours["scratch_bytes"] / trl["scratch_bytes"], MOST_MEMORY),
    }


def growth(case: Case, length: int, scratch: int) -> dict[str, Any]:
    """Memory at another length over that of the case, which took ``scratch`` bytes."""
    problem = Problem(replace(case, tokens=2 * length, length=length), "cpu")
    (ours,), _ = competitors(problem, "cpu", ["linear_loss"])
    grown = memory(ours, problem, "cpu")["scratch_bytes"]
    return check(grown / scratch, MOST_GROWTH + MOST_GROWTH_BYTES / scratch) | {"scratch_bytes": grown}


def check(ratio: float, most: float) -> dict[str, Any]:
    return {"ratio": ratio, "most": most, "holds": ratio <= most}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each of the two sequences")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--long", type=int, default=32768, help="the length at which memory is compared; 0 skips it")
    parser.add_argument("--columns", type=int, default=8192, help="width of TRL's tiles")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to repeat each case")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    pair = Case(2 * options.length, options.hidden, options.vocab, options.length)
    report: dict[str, Any] = {"environment": environment("cpu"), "trl_columns": options.columns, "results": []}
    missed = False
    for case in (pair, replace(pair, loss="dapo"), replace(pair, frozen=True)):
        try:
            result = run_case(case, "cpu", options.seconds, METHODS, options.columns)
        except ArithmeticError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
            return 1
        print(table(result), flush=True)
        if "trl" not in result["methods"]:
            print(f"cannot compare: {result['absent']}", file=sys.stderr)
            return 2
        result["checks"] = checks(result)
        if case == pair and options.long:
            scratch = result["methods"]["linear_loss"]["scratch_bytes"]
            result["checks"]["growth"] = growth(case, options.long, scratch)
        report["results"].append(result)
        for name, found in result["checks"].items():
            verdict = "holds" if found["holds"] else "MISSED"
            print(f"  {name:8s} {found['ratio']:.3f} x (at most {found['most']:.3f} x) {verdict}", flush=True)
            missed |= not found["holds"]
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
