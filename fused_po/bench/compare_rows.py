"""One case of the row kernels: every way in turns, in bytes a second over those of a large copy of the same run.

A case is reported only if this project's results pass the accuracy check.
"""

from __future__ import annotations

from typing import Any

import torch

from fused_po.bench.accuracy import errors, rejected
from fused_po.bench.measure import interleaved, large_copy, summary
from fused_po.bench.rows import NEGATIVE, RowCase, RowProblem, competitors
from fused_po.kernels.select import BACKENDS

__all__ = ["run_rows", "table"]


def run_rows(case: RowCase, device: str, seconds: float) -> dict[str, Any]:
    """One case: the copy, and a row for each way."""
    # recompiling has a limit
    torch._dynamo.reset()
    problem = RowProblem(case, device)
    truth, bound = problem.bounds()
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
    del truth
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
