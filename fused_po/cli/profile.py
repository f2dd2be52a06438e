"""``fused-po profile``: memory and time against length, of a head or a whole step, predicted and measured."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from fused_po.cli.arguments import memory_size, positive

__all__ = ["add_parser"]

_EPILOG = """\
Before anything runs, the memory model predicts the peak at every length and the largest length that fits. Lengths that
would not fit, or would take longer than --seconds, are not run and shown as predicted. The fused route is DPO through
linear_loss, the other the same loss through full logits and autograd; a length is the number of tokens of one pair.
"""
_LENGTHS = [1 << power for power in range(10, 21)]
_TITLES = {"fused": "fused", "full_logits": "full logits"}


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser("profile", help="memory and time against sequence length", epilog=_EPILOG)
    add = parser.add_argument
    add("--hidden", type=positive(int), metavar="H", help="hidden size of the head")
    add("--vocab", type=positive(int), metavar="V", help="classes of the head")
    add("--model", help="instead of --hidden and --vocab: 'tiny', or a folder or hub id of transformers")
    add("--whole-step", action="store_true", help="forward and backward of the whole --model, not of its head alone")
    add("--frozen", action="store_true", help="the head is not trained")
    add("--lengths", type=positive(int), nargs="+", default=_LENGTHS, metavar="N", help="default 1024, 2048, ... 1M")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32 on a CPU, bfloat16 on a GPU")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--memory", type=memory_size, metavar="SIZE", help="such as 80GiB; default: what is free on the device")
    add("--scratch", type=memory_size, metavar="SIZE", help="scratch_bytes of linear_loss, default its own")
    add("--seconds", type=positive(float), default=30.0, help="longest step that is run, as predicted; default 30")
    add("--snapshot", type=Path, metavar="FILE", help="memory snapshot of the longest fused step, for a GPU")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True, help="folder for profile.png, profile.json and profile.csv")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, predict, measure, write.

    Raises:
        ValueError: arguments that do not fit together, or a device that is not there.
    """
    by_size = arguments.hidden is not None and arguments.vocab is not None
    if by_size == (arguments.model is not None):
        raise ValueError("either --hidden with --vocab, or --model, is wanted")
    if arguments.whole_step and arguments.model is None:
        raise ValueError("--whole-step is of a --model")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"{arguments.output} is a file; --output wants a folder")
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU; fused-po doctor says more")
    if arguments.snapshot is not None and device == "cpu":
        raise ValueError("--snapshot records torch's CUDA allocator; on a CPU there is none, see profile.json instead")
    from fused_po.cli.profile_steps import HeadSteps, ModelSteps, Steps, free_memory, measure, snapshot

    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    memory = arguments.memory or free_memory(device)
    common = {"device": device, "dtype": dtype, "scratch_bytes": arguments.scratch, "seed": arguments.seed}
    steps: Steps
    if arguments.whole_step:
        steps = ModelSteps(arguments.model, frozen=arguments.frozen, **common)
    elif arguments.model is not None:
        steps = HeadSteps.of_model(arguments.model, frozen=arguments.frozen, **common)
    else:
        steps = HeadSteps(arguments.hidden, arguments.vocab, frozen=arguments.frozen, **common)
    lengths = sorted({max(2, length // 2 * 2) for length in arguments.lengths})
    largest = {route: steps.largest(route, memory) for route in _TITLES}
    print(f"{steps.describe()}, {memory / 2**30:.1f} GiB of memory")
    for route, length in largest.items():
        print(f"  largest length predicted to fit, {_TITLES[route]}: {length} tokens")
    print(steps.explain(lengths[-1]))
    rows = [row for route in _TITLES for row in measure(steps, route, lengths, memory, arguments.seconds)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.snapshot is not None:
        ran = [row["length"] for row in rows if row["route"] == "fused" and row["seconds"] is not None]
        if ran:
            snapshot(steps, max(ran), arguments.snapshot)
            print(f"wrote {arguments.snapshot}: open it at pytorch.org/memory_viz")
    found = {
        "what": steps.describe(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "memory_bytes": memory,
        "largest_length": largest,
        "rows": rows,
    }
    (arguments.output / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _write_csv(rows, arguments.output / "profile.csv")
    _plot(found, arguments.output / "profile.png")
    _print(rows)
    print(f"wrote {arguments.output}/profile.png, profile.json and profile.csv")
    return 0


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = [name for name in rows[0] if name != "parts"]
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"predicted_{part}_bytes" for part in parts)])
        writer.writerows(
            [*(row[name] for name in names), *(row["parts"].get(part, 0) for part in parts)] for row in rows
        )


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("length", "route", "predicted MiB", "measured MiB", "seconds", ""):
        table.add_column(heading, justify="left" if heading in ("route", "") else "right")
    for row in sorted(rows, key=lambda row: (row["length"], row["route"] != "fused")):
        measured = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.3g}"
        predicted = f"{row['predicted_bytes'] / 2**20:.0f}"
        table.add_row(str(row["length"]), _TITLES[row["route"]], predicted, measured, seconds, row["status"])
    # a file has no width
    Console(width=None if Console().is_terminal else 120).print(table)


def _plot(found: dict[str, Any], path: Path) -> None:
    """Predicted as lines, measured as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, seconds) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for (route, title), colour in zip(_TITLES.items(), ("C0", "C3"), strict=True):
        rows = [row for row in found["rows"] if row["route"] == route]
        ran = [row for row in rows if row["seconds"] is not None]
        lengths, measured = [row["length"] for row in rows], [row["length"] for row in ran]
        memory.plot(lengths, [r["predicted_bytes"] / 2**30 for r in rows], color=colour, label=f"{title}, predicted")
        memory.plot(measured, [r["peak_bytes"] / 2**30 for r in ran], "o", color=colour, label=f"{title}, measured")
        seconds.plot(measured, [row["seconds"] for row in ran], "o-", color=colour, label=title)
    memory.axhline(found["memory_bytes"] / 2**30, color="grey", linestyle="--", label="memory")
    memory.set_title("peak memory, GiB")
    seconds.set_title("forward and backward, seconds")
    for axis in (memory, seconds):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(found["what"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
