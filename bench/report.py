"""Writes docs/performance.md, its plots and the figures of README.md from the JSON files in bench/results: no figure
there is typed by hand.

``python -m bench.report`` after new results.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from bench import readme
from bench.counters import section as counters_section
from bench.on_paper import g_section, paper_section
from bench.prose import prose
from bench.targets import results_by_case, targets
from fused_po.bench.competitors import NAMES
from fused_po.bench.objectives import OBJECTIVES
from fused_po.pictures import png

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
DOCS = FOLDER.parent / "docs"
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "quack-kernels", "cut-cross-entropy")
MIB, GIB = 1 << 20, 1 << 30
HEAD = """\
# Performance

Written by `python -m bench.report` from `bench/results/`. A figure is measured unless its section says *on paper*.
What is measured was measured in one run with its peers and with the bare matrix products of the case. A case in which
a result of this project is over its error bound is not reported. `fused-po bench` measures on your machine.

- **ms**: one forward and backward, the median (20th to 80th percentile) of repeats in which the methods take turns.
- **over the floor**: this time over that of the bare products, one `torch.mm` for each that the case needs at least.
- **scratch**: the peak of memory above inputs and gradients.
- **error of the gradient**: relative, to float64. The bound is twice the error that the formulas of the softmax have in
  the dtype of the case; torch's own `log_softmax` can be over it, which is marked.
"""
NO_GPU = """\
**Nothing here was run on a GPU yet.** `bench/gpu_check.sh OUTDIR` builds, tests and measures on a machine that has one.
"""
CHECKS = {
    "time": "time of `linear_loss` over that of TRL's chunked function",
    "memory": "its scratch over TRL's",
    "growth": "its scratch at the long length over that at hand",
}


def title(name: str) -> str:
    route, bracket, backend = name.partition("[")
    return NAMES[route] + (f", {backend.removesuffix(']')}" if bracket else "")


def machine_line(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES if machine.get(name))
    return f"{machine['device']}, {machine['threads']} threads, {versions}, commit {machine['commit']}."


def _head(shape: dict[str, Any]) -> str:
    return "logits given" if shape["from_logits"] else "frozen head" if shape["frozen"] else "trainable head"


def heading(result: dict[str, Any]) -> str:
    shape = result["shape"]
    head = _head(shape)
    budget = "" if shape["scratch_bytes"] is None else f", budget {shape['scratch_bytes'] / GIB:.3g} GiB"
    sizes = f"N={shape['tokens']} H={shape['hidden']} V={shape['vocab']}, sequences of {shape['length']}"
    return f"{OBJECTIVES[shape['loss']].title}, {head}, {sizes}, {shape['rows']} rows, {shape['dtype']}{budget}"


def case_table(result: dict[str, Any]) -> list[str]:
    """A row for each method."""
    floor, products = result["floor"], result["floor"]["gemms"]
    lines = [
        f"### {heading(result)}",
        "",
        f"| method | ms | {'TFLOP/s' if products else 'GB/s'} | over the floor | scratch MiB | error of the gradient |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        worst = max(error for what, error in row["errors"].items() if what not in ("loss", "logp"))
        digits = 1 if floor["ms"] < 100 else 0
        spread = f"{row['ms']:.{digits}f} ({row['p20']:.{digits}f} to {row['p80']:.{digits}f})"
        rate = f"{row['tflops']:.3g}" if products else f"{row['gb_per_s']:.0f}"
        marks = (" (over the bound)" if row["over_bound"] else "") + (" ¹" if row["without_reference"] else "")
        over, scratch = row["ms"] / floor["ms"], row["scratch_bytes"] / MIB
        lines.append(f"| {title(name)}{marks} | {spread} | {rate} | {over:.2f} x | {scratch:.0f} | {worst:.1e} |")
    what = f"{products} bare GEMMs" if products else "bytes at the rate of a copy"
    lines += [f"| {what} | {floor['ms']:.1f} | | 1.00 x | | |", ""]
    lines += [
        f"- {CHECKS[name]}: {check['ratio']:.2f} x, at most {check['most']:.2f} x, "
        f"{'holds' if check['holds'] else '**missed**'}"
        for name, check in result.get("checks", {}).items()
    ]
    return [*lines, ""] if result.get("checks") else lines


def report_section(name: str, report: dict[str, Any]) -> list[str]:
    """The cases of a file, a plot of them, and what did not run."""
    results = report["results"]
    lines = [f"## {name.replace('_', ' ')}", "", machine_line(report["environment"]), ""]
    if results:
        lines += [f"![time over the floor, and scratch]({plot(name, results)})", ""]
    lines += [line for result in results for line in case_table(result)]
    if any(row["without_reference"] for result in results for row in result["methods"].values()):
        lines += ["¹ takes no reference log-probs: timed on the same loss without a reference.", ""]
    absent: dict[str, set[str]] = {}
    for result in results:
        for method, reason in result["absent"].items():
            absent.setdefault(f"{title(method)}: {reason}", set()).add(result["case"])
    failed = [f"- **not reported**: {case}, {reason}" for case, reason in report.get("failed", {}).items()]
    why = [
        f"- {reason}" + ("" if len(cases) == len(results) else f" ({len(cases)} of {len(results)} cases)")
        for reason, cases in sorted(absent.items())
    ]
    return [*lines, *failed, *_left_out(report), *(["Not run:", "", *why] if why else []), ""]


def _left_out(report: dict[str, Any]) -> list[str]:
    return [f"- left out, no time: {case}" for case in report.get("left_out", [])]


def plot(name: str, results: list[dict[str, Any]]) -> str:
    """Draw time over the floor and scratch of each method and case; returns the path from the page."""
    methods = [m for m in NAMES if any(m in result["methods"] for result in results)]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, max(3.0, 0.8 + 0.9 * len(results))), layout="constrained", sharey=True
    )
    height = 0.8 / len(methods)
    drawn = []
    for index, method in enumerate(methods):
        found = [(place, r) for place, r in enumerate(results) if method in r["methods"]]
        places = [place + height * (index - len(methods) / 2 + 0.5) for place, _ in found]
        rows = [result["methods"][method] for _, result in found]
        over = [row["ms"] / result["floor"]["ms"] for row, (_, result) in zip(rows, found, strict=True)]
        scratch = [row["scratch_bytes"] / MIB for row in rows]
        times = axes[0].barh(places, over, height, label=NAMES[method].replace("`", ""))
        memory = axes[1].barh(places, scratch, height)
        axes[0].bar_label(times, fmt="%.2f", padding=2, fontsize=7)
        axes[1].bar_label(memory, fmt="%.0f", padding=2, fontsize=7)
        drawn.append([method, places, over, scratch])
    labels = [f"{r['shape']['loss']}, {_head(r['shape'])}\nV={r['shape']['vocab']}" for r in results]
    axes[0].set_yticks(range(len(results)), labels, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].set_xlabel("time over the floor")
    axes[1].set_xlabel("scratch, MiB")
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(methods))
    for axis in axes:
        # room for the numbers behind the bars
        axis.margins(x=0.1)
        axis.grid(axis="x", alpha=0.3)
    path = DOCS / "performance" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    # what was drawn can be seen where matplotlib is another
    digest = hashlib.sha256(json.dumps([labels, drawn]).encode()).hexdigest()
    path.write_bytes(png(figure, description=digest))
    plt.close(figure)
    return f"performance/{path.name}"


def rows_table(report: dict[str, Any]) -> list[str]:
    """The row kernels: bytes a second of each way over those of a large copy, a line for each case."""
    results = report["results"]
    ways = list(dict.fromkeys(name for result in results for name in result["ways"]))
    lines = [
        "## Row kernels",
        "",
        machine_line(report["environment"]),
        "Bytes that must move a second, in percent of a large copy of the same run, and milliseconds (the median).",
        "",
        f"| case | copy GB/s | {' | '.join(ways)} |",
        f"|---|---|{'---|' * len(ways)}",
    ]
    for result in results:
        rows = (result["ways"].get(name) for name in ways)
        cells = ["" if row is None else f"{100 * row['share_of_copy']:.0f} % ({row['ms']:.2f})" for row in rows]
        copy = f"{result['floor']['copy_gb_per_s']:.0f}"
        lines.append(f"| {' | '.join([result['case'], copy, *cells])} |")
    absent = {f"- {name}: {reason}" for result in results for name, reason in result["absent"].items()}
    failed = [f"- not reported: {name}, {reason}" for name, reason in report["failed"].items()]
    failed += _left_out(report)
    return [*lines, "", *failed, *(["Not run, in some or all cases:", "", *sorted(absent)] if absent else []), ""]


def targets_section(reports: list[dict[str, Any]]) -> list[str]:
    found = targets(results_by_case(reports))
    lines = ["## Targets on a GPU", ""]
    if all(target.holds is None for target in found):
        limits = ", ".join(dict.fromkeys(target.limit for target in found))
        return [
            *lines,
            *prose(
                f"""{len(found)} promises ({limits}) wait for a GPU: `bench/gpu_check.sh OUTDIR` runs the cases and
                checks them where there is one."""
            ),
            "",
        ]
    lines += [
        "Computed by `python -m bench.targets`. The scratch of the pairs is beside gradients and one dW in float32.",
        "",
        "| case | target | measured | |",
        "|---|---|---|---|",
    ]
    for target in found:
        lines.append(f"| {target.what} | {target.limit} | {target.got or ''} | {target.verdict} |")
    return [*lines, ""]


def page() -> str:
    """The page; its plots are written on the way."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    rows = {name: r for name, r in files.items() if any("ways" in case for case in r["results"])}
    cases = {name: r for name, r in files.items() if name not in rows}
    on_gpu = any("NVIDIA" in report["environment"]["device"] for report in files.values())
    lines = [HEAD, *([] if on_gpu else [NO_GPU])]
    lines += [line for name, report in cases.items() for line in report_section(name, report)]
    lines += [line for report in rows.values() for line in rows_table(report)]
    lines += [*paper_section(), *g_section(), *counters_section()]
    reports = list(cases.values())
    lines += targets_section(reports)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "performance.md").write_text(page(), encoding="utf-8")
    readme.write(RESULTS)
