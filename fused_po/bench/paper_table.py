"""The table on paper: this project's routes, what they are not to cost more than, and their peers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fused_po.bench.methods import Absent
from fused_po.bench.paper import CASES, PaperCase, Sheet, measured, sheet
from fused_po.bench.paper_peers import PEERS, count, counted_with, recorded
from fused_po.prices import Device

__all__ = ["REFERENCE", "figures", "report", "show"]

# the device that limits are set for
REFERENCE = "h200"


def figures(found: Sheet, on: Device) -> dict[str, Any]:
    """What a sheet comes to on a device."""
    ledger = found.ledger
    return {
        "ms": 1e3 * ledger.seconds(on),
        "over_bare": found.over_bare(on),
        "over_bare_hidden": found.over_bare(on, hidden=True),
        "over_bare_launches": found.over_bare(on, launches=True),
        "products": len(ledger.products),
        "launches": ledger.launches,
        "waits": ledger.waits,
        "scratch_bytes": found.scratch,
    }


def report(cases: Mapping[str, PaperCase], on: Device, lines: int = 0, seconds: float = 0.0) -> dict[str, Any]:
    """Cases on paper, beside their peers and, where there is a GPU, what is measured.

    Args:
        lines: how many of the dearest lines of each.
        seconds: how long to measure each; 0: not at all.
    """
    rows = {}
    for name, case in cases.items():
        found = sheet(case)
        row: dict[str, Any] = {"limit": case.limit, "ours": figures(found, on), "peers": {}, "measured": None}
        row["dearest"] = [vars(line) for line in found.ledger.dearest(on, lines)]
        for peer in PEERS:
            row["peers"][peer] = _peer(peer, name, on)
        if seconds and torch.cuda.is_available():
            row["measured"] = measured(case, "cuda", seconds)
        rows[name] = row
    return {"on_paper": on.name, "peers_recorded_with": counted_with(), "cases": rows}


def _peer(peer: str, case: str, on: Device) -> dict[str, Any] | None:
    try:
        return figures(count(peer, CASES[case]), on) | {"recorded": False}
    except Absent:
        found = recorded(peer, case)
    return None if found is None else figures(found, on) | {"recorded": True}


def show(found: dict[str, Any]) -> None:
    """Print a report as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"on paper, {found['on_paper']}: price over that of the bare products of the case")
    peers = list(PEERS)
    columns = ["case", "at most", "ours", "hidden", "with launches", "products", "launches", "waits", "scratch"]
    for column in (*columns, *(f"{peer}, scratch" for peer in peers), "measured"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for name, row in found["cases"].items():
        ours = row["ours"]
        over = row["limit"] is not None and found["on_paper"] == REFERENCE and ours["over_bare"] > row["limit"]
        texts = [
            f"{ours['over_bare']:.3f}" + (" OVER" if over else ""),
            f"{ours['over_bare_hidden']:.3f}",
            f"{ours['over_bare_launches']:.3f}",
            *(str(ours[key]) for key in ("products", "launches", "waits")),
            _gib(ours["scratch_bytes"]),
        ]
        for peer in peers:
            other = row["peers"][peer]
            mark = "*" if other and other["recorded"] else ""
            texts.append(f"{other['over_bare']:.3f}{mark}, {_gib(other['scratch_bytes'])}" if other else "-")
        texts.append("not run" if row["measured"] is None else f"{row['measured']['over_bare']:.3f}")
        table.add_row(name, "-" if row["limit"] is None else f"{row['limit']:.2f}", *texts)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for name, row in found["cases"].items():
        for line in row["dearest"]:
            console.print(f"{name}: {1e3 * line['seconds']:.3f} ms, {line['times']} x {line['name']}, {line['line']}")
    used = found["peers_recorded_with"]
    versions = ", ".join(f"{name} {number}" for name, number in used.items() if name != "command")
    console.print(
        "at most: this project's own limit, set for an h200. hidden: accumulators pass while products compute. "
        "scratch: most alive beyond inputs and returned gradients."
    )
    if any(other and other["recorded"] for row in found["cases"].values() for other in row["peers"].values()):
        console.print(f"*: counted before, with {versions}, by {used['command']}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
