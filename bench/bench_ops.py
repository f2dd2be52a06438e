"""Short timings of the three operations, forward and backward, with their floors and peers in the same run.

    python -m bench.bench_ops --device cuda --output ops.json

A case is reported only if this project's results pass the accuracy check; the exit status tells whether all were.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from bench.accuracy import bounds, rejected, way_errors
from bench.cases import Case, Problem
from bench.measure import floors, interleaved, memory, step, summary
from bench.runner import main
from bench.ways import OURS, competitors


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        first = Case(256, 64, 1000, 128) if quick else Case(1024, 256, 16000, 512)
        return [first, *variants(first)]
    first = Case(8192, 4096, 131072, dtype=torch.bfloat16)
    if quick:
        return [first, *variants(first)]
    shapes = [(4096, 4096, 128256), (8192, 4096, 151936), (16384, 2048, 248320), (8192, 2304, 256000)]
    others = [Case(*shape, dtype=torch.bfloat16) for shape in shapes]
    pair = Case(131072, 4096, 128256, 65536, dtype=torch.bfloat16)
    return [first, *variants(first), replace(first, rows="flat"), *others, pair]


def variants(case: Case) -> list[Case]:
    return [replace(case, loss="dapo"), replace(case, frozen=True), replace(case, from_logits=True)]


def run(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """One case: the floors, and a row for each way."""
    problem = Problem(case, device)
    truth, bound = bounds(problem)
    ways, absent = competitors(case.from_logits)
    found: dict[str, dict[str, float]] = {}
    for name in list(ways):
        try:
            found[name] = way_errors(ways[name], problem, truth)
        except Exception as error:
            if name in OURS:
                raise
            # out of memory, most often
            absent[name] = f"{type(error).__name__}: {error}"
            del ways[name]
    wrong = {name: rejected(errors, bound) for name, errors in found.items() if name in OURS}
    if any(wrong.values()):
        raise ArithmeticError(f"not reported, {wrong}")
    del truth
    bare, traffic = floors(problem, device)
    times = interleaved({name: step(way, problem) for name, way in ways.items()} | bare, device, seconds)
    rate = traffic / summary(times["copy"])["ms"] / 1e6
    # read the logits, read them again, write their gradient; or the bare products
    moved = 3 * problem.logits.nbytes if problem.logits is not None else 0
    floor = moved / rate / 1e6
    if "gemms" in times:
        floor = summary(times["gemms"])["ms"] * case.tokens / min(8192, case.tokens)
    rows = {}
    for name, way in ways.items():
        row = summary(times[name])
        row["tflops"] = case.gemms * 2 * case.tokens * case.hidden * case.vocab / row["ms"] / 1e9
        row["gb_per_s"] = moved / row["ms"] / 1e6
        row["share_of_floor"] = floor / row["ms"]
        rows[name] = row | memory(way, problem, device) | {"errors": found[name]}
    floor_row = {"ms": floor, "copy_gb_per_s": rate, "gemms": case.gemms}
    return {"case": case.name, "floor": floor_row, "ways": rows, "absent": absent, "error_bounds": bound}


def table(result: dict[str, Any]) -> str:
    floor = result["floor"]
    lines = [
        f"{result['case']}: floor {floor['ms']:.3f} ms ({floor['gemms']} GEMMs), copy {floor['copy_gb_per_s']:.0f} GB/s"
    ]
    for name, row in result["ways"].items():
        worst = max(value for key, value in row["errors"].items() if key not in ("loss", "logp"))
        lines.append(
            f"  {name:20s}{row['ms']:11.3f} ms ({row['p20']:.3f} to {row['p80']:.3f}){row['tflops']:8.1f} TFLOP/s"
            f"{row['gb_per_s']:8.0f} GB/s{100 * row['share_of_floor']:6.1f} % of floor"
            f"{row['scratch_bytes'] / 2**20:10.1f} MiB scratch{row['peak_bytes'] / 2**20:10.1f} peak"
            f"  gradient {worst:.1e}"
        )
    lines += [f"  {name:20s} not run: {reason}" for name, reason in result["absent"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(__doc__, cases, run, table))
