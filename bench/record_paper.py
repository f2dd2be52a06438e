"""What calls cost on paper, kept in the repository.

python -m bench.record_paper           # bench/results/paper/routes.json, which a test holds the routes to
python -m bench.record_paper --peers   # fused_po/bench/paper_peers.json: TRL counted, with a CUDA build of torch
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fused_po.bench import paper_peers
from fused_po.bench.paper import CASES
from fused_po.bench.paper_table import REFERENCE, figures, report
from fused_po.prices import Device, device

__all__ = ["routes", "trl_on"]

ROUTES = Path(__file__).parent / "results" / "paper" / "routes.json"


def routes() -> dict[str, Any]:
    """The recorded figures of this project's routes: ``on_paper``, the device, and ``cases`` by name."""
    found: dict[str, Any] = json.loads(ROUTES.read_text(encoding="utf-8"))
    return found


def trl_on(on: Device, case: str) -> dict[str, Any] | None:
    """The recorded figures of TRL's function; None: it was not counted on that case."""
    found = paper_peers.recorded("trl", case)
    return None if found is None else figures(found, on)


def record_routes() -> None:
    """The figures of all cases, and what is measured of them where there is a GPU."""
    found = report(CASES, device(REFERENCE), seconds=3.0)["cases"]
    rows = {name: row["ours"] | {"measured": row["measured"]} for name, row in found.items()}
    ROUTES.write_text(json.dumps({"on_paper": REFERENCE, "cases": rows}, indent=1) + "\n", encoding="utf-8")


def record_peers() -> None:
    """Every case through every peer; a line for each, for they are long."""
    used = {"command": "python -m bench.record_paper --peers", "python": platform.python_version()}
    used |= {name: version(name) for name in ("torch", "trl", "triton")}
    peers = []
    for name in paper_peers.PEERS:
        sheets = {case: paper_peers.count(name, CASES[case]) for case in CASES}
        found = {case: sheet.ledger.to_json() | {"scratch": sheet.scratch} for case, sheet in sheets.items()}
        lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(row)}" for case, row in found.items())
        peers.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    text = f'{{"with": {json.dumps(used)},\n"peers": {{\n{",".join(peers)}\n}}}}\n'
    paper_peers.RECORDED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="count the peers in place of this project's routes")
    (record_peers if parser.parse_args().peers else record_routes)()
