"""What ``fused-po profile`` found, as lines, a table, CSV and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

__all__ = ["TITLES", "largest_lengths", "show", "write"]

TITLES = {"fused": "fused", "full_logits": "full logits"}
_KIB, _UNITS = 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def memory_words(size: float) -> str:
    """Bytes in the unit that fits."""
    index = 0
    while size >= _KIB and index < len(_UNITS) - 1:
        size, index = size / _KIB, index + 1
    return f"{size:.3g} {_UNITS[index]}" if size < 1000 else f"{size:.0f} {_UNITS[index]}"


def time_words(seconds: float) -> str:
    """Seconds in the unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def length_words(tokens: float) -> str:
    """Tokens as people write them: 1k is 1024."""
    for unit, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= scale:
            return f"{tokens / scale:.4g}{unit}"
    return f"{tokens:.4g}"


def largest_lengths(largest: dict[str, int], memory: int) -> str:
    """The most tokens that fit, by route."""
    found = ", ".join(f"{length} tokens {TITLES[route]}" for route, length in largest.items())
    return f"largest length predicted to fit into {memory_words(memory)}: {found}"


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table, the shortest first; columns that say nothing are left out."""
    from rich.console import Console
    from rich.table import Table

    columns = {
        "length": lambda row: str(row["length"]),
        "route": lambda row: TITLES[row["route"]],
        "predicted peak": lambda row: memory_words(row["predicted_bytes"]),
        "on paper": lambda row: "" if row["paper_seconds"] is None else time_words(row["paper_seconds"]),
        "measured peak": lambda row: "" if row["peak_bytes"] is None else memory_words(row["peak_bytes"]),
        "measured time": lambda row: "" if row["seconds"] is None else time_words(row["seconds"]),
        "": lambda row: row["status"],
    }
    ordered = sorted(rows, key=lambda row: (row["length"], row["route"] != "fused"))
    cells = {heading: [words(row) for row in ordered] for heading, words in columns.items()}
    cells = {heading: column for heading, column in cells.items() if any(column)}
    table = Table()
    for heading in cells:
        table.add_column(heading, justify="left" if heading in ("route", "") else "right")
    for line in zip(*cells.values(), strict=True):
        table.add_row(*line)
    # a file has no width
    Console(width=None if Console().is_terminal else 120).print(table)


def write(found: dict[str, Any], folder: Path) -> None:
    """Write profile.json, profile.csv and profile.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _write_csv(found["rows"], folder / "profile.csv")
    _plot(found, folder / "profile.png")


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = [name for name in rows[0] if name != "parts"]
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"predicted_{part}_bytes" for part in parts)])
        writer.writerows(
            [*(row[name] for name in names), *(row["parts"].get(part, 0) for part in parts)] for row in rows
        )


def _plot(found: dict[str, Any], path: Path) -> None:
    """Predictions as lines, measurements as points; time only where there is any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = any(row[name] is not None for row in found["rows"] for name in ("seconds", "paper_seconds"))
    count = 2 if timed else 1
    figure, axes = pyplot.subplots(1, count, figsize=(6 * count, 4.5), layout="constrained", squeeze=False)
    memory, seconds = axes[0, 0], axes[0, -1]
    for (route, title), colour in zip(TITLES.items(), ("C0", "C3"), strict=True):
        rows = [row for row in found["rows"] if row["route"] == route]
        _line(memory, rows, "predicted_bytes", "-", colour, f"{title}, predicted")
        _line(memory, rows, "peak_bytes", "o", colour, f"{title}, measured")
        if timed:
            _line(seconds, rows, "paper_seconds", "-", colour, f"{title}, on paper")
            _line(seconds, rows, "seconds", "o-", colour, f"{title}, measured")
    memory.axhline(found["memory_bytes"], color="grey", linestyle="--", label=memory_words(found["memory_bytes"]))
    memory.set_title("peak memory")
    _ticks(memory, 2, memory_words)
    if timed:
        seconds.set_title("forward and backward")
        _ticks(seconds, 10, time_words)
    figure.suptitle(found["what"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _line(axis: Any, rows: list[dict[str, Any]], name: str, style: str, colour: str, label: str) -> None:
    points = [(row["length"], row[name]) for row in rows if row[name] is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label)


def _ticks(axis: Any, base: int, words: Any) -> None:
    """Ticks in words, on axes that are drawn logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=base)
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axis.yaxis.set_major_locator(LogLocator(base=base, numticks=10))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_words(value)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_locator(NullLocator())
        one.set_minor_formatter(NullFormatter())
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
