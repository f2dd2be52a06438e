"""Block sizes of the row kernels, measured on a GPU and put into ``fused_po/kernels/configs.json``.

    python -m bench.tune --output first.json
    python -m bench.tune --output second.json
    python -m bench.tune --write first.json second.json

A candidate whose results are over the error bound is not timed. ``--write`` takes at least two runs of one
architecture, and a configuration only if it is 2 % faster than the default over all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.arguments import parser_of, run_all
from bench.targets import UNREADABLE
from fused_po.bench.accuracy import errors, rejected
from fused_po.bench.measure import Call, interleaved, summary
from fused_po.bench.rows import RowCase, RowProblem
from fused_po.kernels import configs, library
from fused_po.kernels.contract import Coefficients, Span, Transform, finish

KERNELS = {"row_stats": "logp+entropy", "row_softmax": "tile", "row_grad": "tile"}
OUTPUTS = ("logp", "entropy")
# of the default's time, for another configuration to be taken
ENOUGH = 0.98

Config = dict[str, int]


@dataclass(frozen=True)
class TuneCase:
    """A kernel on logits of a dtype."""

    kernel: str
    rows: RowCase

    @property
    def name(self) -> str:
        return f"{self.kernel}-{self.rows.name}"


def cases(device: str) -> list[TuneCase]:
    count, vocab = (8192, 131072) if device == "cuda" else (4, 300)
    dtypes = (torch.bfloat16, torch.float32)
    return [
        TuneCase(kernel, RowCase(count, vocab, what, dtype)) for kernel, what in KERNELS.items() for dtype in dtypes
    ]


def candidates(device: str) -> list[Config]:
    """4 to 32 elements a thread."""
    if device != "cuda":
        return [{"BLOCK": 64, "num_warps": 1}, {"BLOCK": 128, "num_warps": 2}]
    blocks, warps = (1024, 2048, 4096, 8192, 16384), (4, 8, 16, 32)
    return [{"BLOCK": b, "num_warps": w} for b in blocks for w in warps if 4 <= b // (32 * w) <= 32]


def run(case: TuneCase, device: str, seconds: float) -> dict[str, Any]:
    """One kernel: the time of each candidate and of the default."""
    problem = RowProblem(case.rows, device)
    truth, bound = problem.bounds()
    call = launch(case.kernel, problem)
    calls: dict[str, Call] = {"default": call}
    refused = {}
    for config in candidates(device):
        name = json.dumps(config)
        candidate = partial(within, case.kernel, config, call)
        problem.poison()
        try:
            found = errors(problem.sample(candidate()), truth)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        if wrong := rejected(found, bound):
            refused[name] = f"over the bound: {wrong}"
        else:
            calls[name] = candidate
    times = interleaved(calls, device, seconds, ahead=True)
    return {
        "case": case.name,
        "kernel": case.kernel,
        "architecture": configs.architecture(problem.x.device),
        "times": {name: summary(found) for name, found in times.items()},
        "refused": refused,
    }


def launch(kernel: str, problem: RowProblem) -> Any:
    """A call of the Triton kernel that returns its results."""
    x, labels, span = problem.x, problem.labels, Span(0, problem.case.vocab)
    stats = partial(library.row_stats, x, labels, Transform(), span, OUTPUTS, "triton")
    if kernel == "row_stats":
        return lambda: finish(stats(), labels, span.width, OUTPUTS)[0].present()
    assert problem.tile is not None
    tile = problem.tile
    if kernel == "row_softmax":

        def softmax() -> dict[str, torch.Tensor]:
            partials = library.row_softmax(x, labels, Transform(), span, ("logp",), tile, "triton")
            return finish(partials, labels, span.width, ("logp",))[0].present() | {"tile": tile}

        return softmax
    _, anchors = finish(stats(), labels, span.width, OUTPUTS)
    # with an entropy's coefficient, which is the longer way, though it adds nothing here
    coefficients = Coefficients(torch.ones_like(anchors[0]), torch.zeros_like(anchors[0]))

    def grad() -> dict[str, torch.Tensor]:
        library.row_grad(x, labels, Transform(), span, anchors, coefficients, tile, "triton")
        return {"tile": tile}

    return grad


def within(kernel: str, config: Config, call: Call) -> Any:
    with configs.override(kernel, config):
        return call()


def table(result: dict[str, Any]) -> str:
    default = result["times"]["default"]["ms"]
    lines = [f"{result['case']}: default {default:.3f} ms"]
    others = sorted(result["times"].items(), key=lambda item: item[1]["ms"])
    lines += [f"  {row['ms']:9.3f} ms {row['ms'] / default:6.3f} x  {name}" for name, row in others]
    lines += [f"  refused {name}: {reason}" for name, reason in result["refused"].items()]
    return "\n".join(lines)


def best(reports: list[dict[str, Any]]) -> tuple[str, dict[str, Config]]:
    """The architecture of the runs, and for each kernel the fastest configuration, where it is faster than the default.

    Raises:
        ValueError: fewer than two runs, runs of several architectures, or on a CPU.
    """
    if len(reports) < 2:
        raise ValueError("two runs or more are wanted: one is luck")
    results = [result for report in reports for result in report["results"]]
    names = {result["architecture"] for result in results}
    if len(names) != 1 or "default" in names:
        raise ValueError(f"runs on GPUs of one architecture are wanted: got {sorted(names)}")
    found = {}
    for kernel in KERNELS:
        ratios: dict[str, list[float]] = {}
        mine = [result["times"] for result in results if result["kernel"] == kernel]
        for times in mine:
            for name, row in times.items():
                ratios.setdefault(name, []).append(row["ms"] / times["default"]["ms"])
        # one that was refused somewhere does not count
        means = {name: statistics.geometric_mean(r) for name, r in ratios.items() if len(r) == len(mine)}
        name = min(means, key=lambda one: means[one], default="default")
        if name != "default" and means[name] <= ENOUGH:
            found[kernel] = json.loads(name)
    return names.pop(), found


def write(paths: list[Path], target: Path) -> None:
    """Put the best configurations of the runs into the table."""
    name, found = best([json.loads(path.read_text(encoding="utf-8")) for path in paths])
    existing = json.loads(target.read_text(encoding="utf-8"))
    existing[name] = found
    rows = ",\n".join(
        f" {json.dumps(key)}: {{\n"
        + ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(config)}" for kernel, config in entry.items())
        + "\n }"
        for key, entry in existing.items()
    )
    text = f"{{\n{rows}\n}}\n"
    configs.checked(text)
    target.write_text(text, encoding="utf-8")
    print(f"{name}: {found or 'the default stays'}")


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__, seconds=2.0)
    parser.add_argument("--write", type=Path, nargs="+", metavar="RUN", help="take the best of these runs, and stop")
    options = parser.parse_args(arguments)
    if options.write:
        try:
            write(options.write, configs.TABLE)
        except UNREADABLE as error:
            print(f"not written ({type(error).__name__}: {error})", file=sys.stderr)
            return 2
        return 0
    return run_all(cases(options.device), run, table, options)


if __name__ == "__main__":
    sys.exit(main())
