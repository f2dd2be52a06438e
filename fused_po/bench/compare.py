"""One case: every method forward and backward in turns, with the floors in the same run.

A case is reported only if this project's results pass the accuracy check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from fused_po.bench.accuracy import Results, bounds, method_errors, rejected
from fused_po.bench.cases import Case, Problem
from fused_po.bench.competitors import competitors
from fused_po.bench.measure import FLOOR_ROWS, floors, interleaved, memory, step, summary
from fused_po.bench.methods import Method

__all__ = ["run_case", "table"]


def run_case(
    case: Case, device: str, seconds: float, only: Sequence[str] | None = None, trl_columns: int | None = None
) -> dict[str, Any]:
    """Measure a case.

    Args:
        seconds: how long to repeat.
        only: names of methods; None: all.
        trl_columns: the width of TRL's tiles, default that of its trainers.

    Returns:
        ``case``, its fields; ``floor``: the bare products and the copy; ``methods``: a row each; ``absent``: why the
        others did not run; ``error_bounds``.

    Raises:
        ArithmeticError: a method of this project is wrong.
    """
    # recompiling has a limit
    torch._dynamo.reset()
    problem = Problem(case, device)
    methods, absent = competitors(problem, device, only, trl_columns)
    truths, limits = {}, {}
    for other in {False} | {method.without_reference for method in methods}:
        truths[other], limits[other] = bounds(problem.without_reference() if other else problem)
    found = _errors(methods, problem, truths, absent)
    over = {m.name: rejected(found[m.name], limits[m.without_reference]) for m in methods if m.name in found}
    if wrong := {m.name: over[m.name] for m in methods if m.ours and over.get(m.name)}:
        raise ArithmeticError(f"not reported, {wrong}")
    del truths
    running = [method for method in methods if method.name in found]
    bare, traffic = floors(problem, device)
    times = interleaved({m.name: step(m, problem) for m in running} | bare, device, seconds)
    rate = traffic / summary(times["copy"])["ms"] / 1e6
    # read the logits, read them again, write their gradient; or the bare products
    moved = 3 * problem.logits.nbytes if problem.logits is not None else 0
    floor: dict[str, Any] = {"ms": moved / rate / 1e6, "gemms": case.gemms, "copy_gb_per_s": rate}
    if "gemms" in times:
        bare_times = summary(times["gemms"])
        floor |= {"ms": bare_times["ms"] * case.tokens / min(FLOOR_ROWS, case.tokens), "repeats": bare_times["repeats"]}
    rows = {}
    for method in running:
        row = summary(times[method.name])
        row["tflops"] = case.gemms * 2 * case.tokens * case.hidden * case.vocab / row["ms"] / 1e9
        row["gb_per_s"] = moved / row["ms"] / 1e6
        row["share_of_floor"] = floor["ms"] / row["ms"]
        row |= memory(method, problem, device) | {"errors": found[method.name], "ours": method.ours}
        row["over_bound"] = over[method.name]
        row["without_reference"] = method.without_reference
        rows[method.name] = row | ({"backend": method.backend} if method.backend else {})
    return {
        "case": case.name,
        "shape": asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")},
        "floor": floor,
        "methods": rows,
        "absent": absent,
        "error_bounds": limits[False],
    }


def _errors(
    methods: Sequence[Method], problem: Problem, truths: dict[bool, Results], absent: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Errors by method; one that raises goes to ``absent`` with the reason."""
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        try:
            truth = truths[method.without_reference]
            found[method.name] = method_errors(method, method.problem(problem), truth)
        except Exception as error:
            if method.ours and not (method.name.startswith("token_stats") and _out_of_memory(error)):
                raise
            # out of memory, most often
            absent[method.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def table(result: dict[str, Any], told: set[tuple[str, str]] | None = None) -> str:
    """A case as lines of text.

    Args:
        told: which methods were said not to run, and why: that is said once, and added here.
    """
    floor = result["floor"]
    what = f"{floor['gemms']} bare GEMMs" if floor["gemms"] else "bytes over those of the copy"
    lines = [f"{result['case']}: floor {floor['ms']:.3f} ms ({what}), copy {floor['copy_gb_per_s']:.0f} GB/s"]
    for name, row in result["methods"].items():
        worst = max(value for key, value in row["errors"].items() if key not in ("loss", "logp"))
        rate = f"{row['tflops']:8.2f} TFLOP/s" if floor["gemms"] else f"{row['gb_per_s']:8.0f} GB/s"
        lines.append(
            f"  {name:30s}{row['ms']:11.3f} ms ({row['p20']:.3f} to {row['p80']:.3f}){rate}"
            f"{100 * row['share_of_floor']:6.1f} % of floor{row['scratch_bytes'] / 2**20:10.1f} MiB scratch"
            f"  gradient error {worst:.1e}{' OVER THE BOUND' if row['over_bound'] else ''}"
        )
    told = set() if told is None else told
    absent = [pair for pair in result["absent"].items() if pair not in told]
    told.update(absent)
    lines += [f"  {name:30s} not run: {reason}" for name, reason in absent]
    return "\n".join(lines)
