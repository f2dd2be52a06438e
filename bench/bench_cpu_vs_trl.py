"""DPO, DAPO and DPO with a frozen head on a CPU against TRL's chunked log-probs in the same run: time, and memory above
inputs and gradients, with targets.

    python -m bench.bench_cpu_vs_trl --output bench/results/cpu_vs_trl.json

The exit status is 1 if a target is missed, a result is wrong, or TRL can't be run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from bench.arguments import parser_of, run_all
from fused_po.bench.cases import Case, Problem
from fused_po.bench.compare import run_case, table
from fused_po.bench.competitors import competitors
from fused_po.bench.measure import memory

# of TRL's time and memory, and of the memory at the shorter length
MOST_TIME, MOST_MEMORY, MOST_GROWTH, MOST_GROWTH_BYTES = 0.60, 0.15, 1.10, 8 << 20
METHODS = ("linear_loss", "linear_token_stats", "eager", "trl")


def checks(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
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
    parser = parser_of(__doc__, seconds=120.0)
    parser.set_defaults(device="cpu")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each of the two sequences")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--long", type=int, default=32768, help="the length at which memory is compared; 0 skips it")
    parser.add_argument("--columns", type=int, default=8192, help="width of TRL's tiles")
    options = parser.parse_args()
    pair = Case(2 * options.length, options.hidden, options.vocab, options.length)
    missed = []

    def run(case: Case, device: str, seconds: float) -> dict[str, Any]:
        result = run_case(case, device, seconds, METHODS, options.columns) | {"trl_columns": options.columns}
        if "trl" not in result["methods"]:
            raise ArithmeticError(f"cannot be compared: {result['absent']}")
        result["checks"] = checks(result)
        if case == pair and options.long:
            scratch = result["methods"]["linear_loss"]["scratch_bytes"]
            result["checks"]["growth"] = growth(case, options.long, scratch)
        missed.extend(name for name, found in result["checks"].items() if not found["holds"])
        return result

    cases = (pair, replace(pair, loss="dapo"), replace(pair, frozen=True))
    return run_all(cases, run, show, options) or int(bool(missed))


def show(result: dict[str, Any]) -> str:
    lines = [
        f"  {name:8s} {found['ratio']:.3f} x (at most {found['most']:.3f} x) {'holds' if found['holds'] else 'MISSED'}"
        for name, found in result["checks"].items()
    ]
    return "\n".join([table(result), *lines])


if __name__ == "__main__":
    sys.exit(main())
