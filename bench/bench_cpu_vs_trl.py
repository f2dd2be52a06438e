"""One DPO pair on a CPU against TRL's chunked log-probs: time, and memory above inputs and gradients.

python -m bench.bench_cpu_vs_trl --output bench/results/cpu_vs_trl.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.accuracy import bounds, rejected, way_errors
from bench.cases import Case, Problem
from bench.measure import environment, floors, interleaved, memory, step, summary
from bench.ways import competitors

MIB = 1 << 20
# of TRL's time and memory, and of the memory at 4k tokens
MOST_TIME, MOST_MEMORY, MOST_GROWTH, MOST_GROWTH_BYTES = 0.60, 0.15, 1.10, 8 * MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens of each of the two sequences")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--long", type=int, default=32768, help="the length at which memory is compared; 0 skips it")
    parser.add_argument("--columns", type=int, default=8192, help="width of TRL's tiles")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to repeat")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    def case(length: int) -> Case:
        return Case(2 * length, options.hidden, options.vocab, length)

    machine = environment("cpu")
    problem = Problem(case(options.length), "cpu")
    ways, missing = competitors(from_logits=False, trl_columns=options.columns)
    if missing:
        print(f"cannot compare: {missing}", file=sys.stderr)
        return 2
    truth, bound = bounds(problem)
    errors = {name: way_errors(way, problem, truth) for name, way in ways.items()}
    wrong = rejected(errors["linear_loss"], bound)
    if wrong:
        print(f"not reported: {wrong}", file=sys.stderr)
        return 1
    del truth
    # a bare product for each GEMM, too
    bare, _ = floors(problem, "cpu")
    calls = {name: step(way, problem) for name, way in ways.items()} | {"gemms": bare["gemms"]}
    times = interleaved(calls, "cpu", options.seconds)
    measured = {name: summary(times[name]) | memory(way, problem, "cpu") for name, way in ways.items()}
    rows = {name: row | {"errors": errors[name]} for name, row in measured.items()}
    result = {
        "environment": machine,
        "case": problem.case.name,
        "trl_columns": options.columns,
        "ways": rows,
        "bare_gemms": summary(times["gemms"]),
        "error_bounds": bound,
    }
    ours, trl = rows["linear_loss"], rows["trl"]
    checks = {
        "time": [ours["ms"] / trl["ms"], MOST_TIME],
        "memory": [ours["scratch_bytes"] / trl["scratch_bytes"], MOST_MEMORY],
    }
    if options.long:
        del problem
        grown = memory(ways["linear_loss"], Problem(case(options.long), "cpu"), "cpu")["scratch_bytes"]
        result["scratch_bytes_long"] = grown
        checks["growth"] = [grown / ours["scratch_bytes"], MOST_GROWTH + MOST_GROWTH_BYTES / ours["scratch_bytes"]]
    result["checks"] = {
        name: {"ratio": got, "most": most, "holds": got <= most} for name, (got, most) in checks.items()
    }
    for name, row in rows.items():
        worst = max(row["errors"]["hidden"], row["errors"]["weight"])
        print(
            f"{name:20s}{row['ms']:10.1f} ms ({row['p20']:.1f} to {row['p80']:.1f})"
            f"{row['scratch_bytes'] / MIB:10.1f} MiB scratch  gradient {worst:.1e}"
        )
    print(f"{'bare GEMMs':20s}{result['bare_gemms']['ms']:10.1f} ms")
    for name, check in result["checks"].items():
        print(f"{name:8s} {check['ratio']:.3f} (at most {check['most']:.3f}) {'holds' if check['holds'] else 'MISSED'}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(check["holds"] for check in result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
