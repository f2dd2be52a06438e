"""Bytes moved by the row kernels over those of a large copy in the same run, with their peers.

    python -m bench.bench_rows --device cuda --output rows.json

A case is reported only if this project's results pass the accuracy check; the exit status tells whether all were.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.rows import NEGATIVE, RowCase, RowProblem, competitors
from fused_po.bench.accuracy import allowed, errors, rejected
from fused_po.bench.measure import interleaved, large_copy, summary
from fused_po.bench.runner import run_cases
from fused_po.kernels.select import BACKENDS

WHAT = ("logp", "logp+entropy", "tile")
# so that a case reads about 2 or 4 GB
SHAPES = {32000: 16384, 128256: 8192, 131072: 8192, 151936: 8192, 262144: 4096}


def cases(device: str, quick: bool) -> list[RowCase]:
    if device == "cpu":
        rows, vocab = (64, 1000) if quick else (512, 32000)
        return [RowCase(rows, vocab, what, torch.float32, kind) for what in WHAT for kind in ("peaked", "flat")]
    found = [RowCase(SHAPES[131072], 131072, what, dtype) for dtype in (torch.bfloat16, torch.float32) for what in WHAT]
    if quick:
        return found
    dtypes, kinds = (torch.bfloat16, torch.float32), ("peaked", "flat")
    every = (
        RowCase(rows, vocab, what, dtype, kind)
        for (vocab, rows), what, dtype, kind in itertools.product(SHAPES.items(), WHAT, dtypes, kinds)
    )
    return [*found, *(case for case in every if case not in found)]


def run(case: RowCase, device: str, seconds: float) -> dict[str, Any]:
    """One case: the copy, and a row for each way."""
    # recompiling has a limit
    torch._dynamo.reset()
    problem = RowProblem(case, device)
    truth, naive = problem.reference(torch.float64), problem.reference(torch.float32)
    bound = allowed(errors(naive, truth), {name: naive[name].dtype for name in naive})
    ways, absent = competitors(problem, device)
    found: dict[str, dict[str, float]] = {}
    for name in list(ways):
        problem.poison()
        try:
            got = problem.sample(ways[name](problem))
        except Exception as error:
            if name.split()[0] in BACKENDS:
                raise
            absent[name] = f"{type(error).__name__}: {error}"
            del ways[name]
            continue
        signed = {key: -value if key in NEGATIVE.get(name, ()) else value for key, value in got.items()}
        # the kernel alone gives no results; the way that finishes them has been compared
        found[name] = errors(signed, {key: truth[key] for key in signed})
    wrong = {name: rejected(found[name], bound) for name in BACKENDS if name in found}
    if any(wrong.values()):
        raise ArithmeticError(f"not reported, {wrong}")
    del truth, naive
    copy, traffic = large_copy(device)
    calls = {name: (lambda way=way: way(problem)) for name, way in ways.items()}
    times = interleaved(calls | {"copy": copy}, device, seconds, ahead=True)
    rate = traffic / summary(times["copy"])["ms"] / 1e6
    rows = {}
    for name in ways:
        row = summary(times[name])
        row["gb_per_s"] = case.traffic / row["ms"] / 1e6
        row["share_of_copy"] = row["gb_per_s"] / rate
        rows[name] = row | {"errors": found[name]}
    floor = {"ms": case.traffic / rate / 1e6, "copy_gb_per_s": rate, "bytes": case.traffic}
    return {"case": case.name, "floor": floor, "ways": rows, "absent": absent, "error_bounds": bound}


def table(result: dict[str, Any]) -> str:
    floor = result["floor"]
    lines = [f"{result['case']}: floor {floor['ms']:.3f} ms, copy {floor['copy_gb_per_s']:.0f} GB/s"]
    for name, row in result["ways"].items():
        worst = max(row["errors"].values(), default=None)
        lines.append(
            f"  {name:18s}{row['ms']:11.3f} ms ({row['p20']:.3f} to {row['p80']:.3f}){row['gb_per_s']:9.0f} GB/s"
            f"{100 * row['share_of_copy']:7.1f} % of copy" + ("" if worst is None else f"  error {worst:.1e}")
        )
    lines += [f"  {name:18s} not run: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few cases, small ones on a CPU")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to repeat each case")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--commit", help="recorded; default what git says")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    return run_cases(
        cases(options.device, options.quick),
        partial(run, device=options.device, seconds=options.seconds),
        table,
        options.device,
        output=options.output,
        commit=options.commit,
        stop_after=options.stop_after,
    )


if __name__ == "__main__":
    sys.exit(main())
