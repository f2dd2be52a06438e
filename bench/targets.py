"""What the project promises of a GPU, computed from the JSON of its runs.

python -m bench.targets TARGETS.json PAIRS.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_po.bench.cases import Case, groups
from fused_po.bench.competitors import NAMES

GIB = 1 << 30
# of the bare products: three with a trainable head, two with a frozen one
MOST_TIME = {False: 1.15, True: 1.12}
# than peers that need at most so many times our memory
LEAST_SPEEDUP, SIMILAR_MEMORY = 1.3, 4.0
# beside gradients and one dW in float32
MOST_PAIR_SCRATCH = 1.5 * GIB
# of the shorter pair's scratch; what the allocator rounds
MOST_PAIR_GROWTH = 1.02
OURS = "linear_loss"
# what a file of another kind, or a broken one, ends in
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A promise: ``got`` at most or at least ``limit``; None where the run has no figure."""

    what: str
    limit: str
    got: str | None
    holds: bool | None

    @property
    def verdict(self) -> str:
        return "not run" if self.holds is None else "holds" if self.holds else "MISSED"


def results_by_case(reports: Sequence[dict[str, Any]]) -> Results:
    """Of runs on a GPU alone: the targets are for one."""
    on_gpu = (report for report in reports if "NVIDIA" in report["environment"]["device"])
    return {result["case"]: result for report in on_gpu for result in report["results"] if "methods" in result}


def targets(results: Results) -> list[Target]:
    """Every promise, whether there is a result or not."""
    known = groups("cuda")
    found = [target for case in known["targets"] for target in _of_case(case, results.get(case.name))]
    return [*found, *_of_pairs([results.get(case.name) for case in known["pairs"]])]


def _of_case(case: Case, result: dict[str, Any] | None) -> list[Target]:
    most = MOST_TIME[case.frozen]
    name, limits = case.name, (f"at most {most} x {case.gemms} GEMMs", "faster than every peer")
    faster = f"{LEAST_SPEEDUP} x faster than peers within {SIMILAR_MEMORY:.0f} x its memory"
    if result is None or OURS not in result["methods"]:
        return [Target(name, limit, None, None) for limit in (*limits, faster)]
    ours, floor = result["methods"][OURS], result["floor"]["ms"]
    peers = {key: row for key, row in result["methods"].items() if not row["ours"]}
    near = {key: r for key, r in peers.items() if r["scratch_bytes"] <= SIMILAR_MEMORY * ours["scratch_bytes"]}
    return [
        Target(name, limits[0], f"{ours['ms'] / floor:.3f} x", ours["ms"] <= most * floor),
        _against(name, limits[1], ours, peers, 1.0),
        _against(name, faster, ours, near, LEAST_SPEEDUP),
    ]


def _against(name: str, limit: str, ours: dict[str, Any], peers: dict[str, Any], least: float) -> Target:
    if not peers:
        return Target(name, limit, None, None)
    best = min(peers, key=lambda key: peers[key]["ms"])
    speedup = peers[best]["ms"] / ours["ms"]
    return Target(name, limit, f"{speedup:.2f} x ({NAMES[best]})", speedup > 1.0 if least == 1.0 else speedup >= least)


def _of_pairs(found: Sequence[dict[str, Any] | None]) -> list[Target]:
    cases = groups("cuda")["pairs"]
    tiles = [None if one is None or OURS not in one["methods"] else one["methods"][OURS] for one in found]
    short, long = (None if row is None else row["tile_bytes"] for row in tiles)
    limit = f"scratch at most {MOST_PAIR_SCRATCH / GIB} GiB"
    grows = f"scratch no more than at {cases[0].tokens} tokens"
    name = cases[1].name
    within = Target(name, limit, None, None)
    flat = Target(name, grows, None, None)
    if long is not None:
        within = Target(name, limit, f"{long / GIB:.2f} GiB", long <= MOST_PAIR_SCRATCH)
    if long is not None and short is not None:
        flat = Target(name, grows, f"{long / short:.3f} x", long <= MOST_PAIR_GROWTH * short)
    return [within, flat]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON of fused-po bench; one that is not there is skipped")
    files = [path for path in parser.parse_args().files if path.exists()]
    try:
        found = targets(results_by_case([json.loads(path.read_text(encoding="utf-8")) for path in files]))
    except UNREADABLE as error:
        print(f"not what fused-po bench wrote ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    for target in found:
        print(f"{target.verdict:8s} {target.what}: {target.limit}" + (f", {target.got}" if target.got else ""))
    return 1 if any(target.holds is False for target in found) else 0


if __name__ == "__main__":
    sys.exit(main())
