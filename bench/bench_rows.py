"""Bytes moved by the row kernels over those of a large copy in the same run, with their peers.

    python -m bench.bench_rows --device cuda --output rows.json

A case is reported only if this project's results pass the accuracy check; the exit status tells whether all were.
"""

from __future__ import annotations

import itertools
import sys

import torch

from bench.arguments import parser_of, run_all
from fused_po.bench.compare_rows import run_rows, table
from fused_po.bench.rows import RowCase

WHAT = ("logp", "logp+entropy", "tile")
# so that a case reads about 2 or 4 GB
SHAPES = {32000: 16384, 128256: 8192, 131072: 8192, 151936: 8192, 262144: 4096}


def cases(device: str, quick: bool) -> list[RowCase]:
    if device == "cpu":
        rows, vocab = (64, 1000) if quick else (512, 32000)
        return [RowCase(rows, vocab, what, torch.float32, kind) for what in WHAT for kind in ("peaked", "flat")]
    found = [RowCase(SHAPES[131072], 131072, what, dtype) for dtype in (torch.bfloat16, torch.float32) for what in WHAT]
    if quick:
        return found
    dtypes, kinds = (torch.bfloat16, torch.float32), ("peaked", "flat")
    every = (
        RowCase(rows, vocab, what, dtype, kind)
        for (vocab, rows), what, dtype, kind in itertools.product(SHAPES.items(), WHAT, dtypes, kinds)
    )
    return [*found, *(case for case in every if case not in found)]


def main() -> int:
    parser = parser_of(__doc__, seconds=6.0)
    parser.add_argument("--quick", action="store_true", help="few cases, small ones on a CPU")
    options = parser.parse_args()
    return run_all(cases(options.device, options.quick), run_rows, table, options)


if __name__ == "__main__":
    sys.exit(main())
