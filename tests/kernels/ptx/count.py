"""Instructions and bytes a logit of the row kernels, as the compilers emit them: ``python -m tests.kernels.ptx.count``.

Each kernel runs on one row of two widths with the same geometry; the difference leaves out what a row costs once. An
instruction counts for all 32 lanes of its warp, as the GPU issues it. These are PTX instructions: the assembler removes
moves and joins others, so the machine code has somewhat fewer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fused_po.kernels.contract import Coefficients, Span, Transform
from fused_po.stats import STATISTICS
from tests.kernels.ptx.launch_cuda import CudaPtx
from tests.kernels.ptx.machine import Counters

__all__ = ["Count", "counts"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# logits, gradient
ELEMENTS = (("bf16", "bf16"), ("fp32", "bf16"))
# whole passes of every geometry, in clusters of four blocks, and half as much again
BYTES = 3 << 16
WANTED = {"logp": ("logp",), "entropy": ("logp", "entropy"), "everything": STATISTICS}


@dataclass(frozen=True)
class Count:
    """One line of the table; what follows ``wanted`` is a logit's."""

    backend: str
    kernel: str
    element: str
    out: str
    softcap: bool
    wanted: str
    instructions: float
    special: float
    read: float
    written: float


def _launch(
    backend: CudaPtx, kernel: str, elements: tuple[str, str], softcap: bool, wanted: str, width: int
) -> Counters:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(1, width, generator=generator)).to(FLOATS[elements[0]])
    out = torch.empty(1, width, dtype=FLOATS[elements[1]])
    labels, span = torch.tensor([5]), Span(0, width)
    transform = Transform(softcap=30.0 if softcap else None)
    if kernel == "row_stats":
        backend.row_stats(x, labels, transform, span, WANTED[wanted])
    elif kernel == "row_softmax":
        backend.row_softmax(x, labels, transform, span, WANTED[wanted], out)
    else:
        one = torch.ones(1)
        triple = Coefficients(one, None if wanted == "logp" else one, None)
        anchors = torch.tensor([[-5.0], [10.0], [-3.0], [2.0]])
        backend.row_grad(x, labels, transform, span, anchors, triple, out)
    return backend.launches[-1][1]


def counts(backend: CudaPtx, name: str) -> Iterator[Count]:
    """Of the gradient, "entropy" means that there is a coefficient for it."""
    for elements in ELEMENTS:
        width = BYTES // FLOATS[elements[0]].itemsize
        for kernel in ("row_stats", "row_softmax", "row_grad"):
            for softcap in (False, True):
                for wanted in ("logp", "entropy") if kernel == "row_grad" else WANTED:
                    short, long = (
                        _launch(backend, kernel, elements, softcap, wanted, w) for w in (width, width * 3 // 2)
                    )
                    found = (
                        (getattr(long, key) - getattr(short, key)) / (width // 2)
                        for key in ("instructions", "special", "read", "written")
                    )
                    out = "" if kernel == "row_stats" else elements[1]
                    yield Count(name, kernel, elements[0], out, softcap, wanted, *found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="a JSON file to write the table to")
    given = parser.parse_args()
    found = []
    print("kernel       logits  out   softcap  wanted      instructions  special  read  written   (a logit)")
    for c in counts(CudaPtx("resident", seed=0), "cuda"):
        found.append(c)
        softcap = "yes" if c.softcap else "no"
        numbers = f"{c.instructions:12.2f} {c.special:8.2f} {c.read:5.2f} {c.written:8.2f}"
        print(f"{c.kernel:12} {c.element:7} {c.out:5} {softcap:8} {c.wanted:11} {numbers}", flush=True)
    if given.output:
        given.output.write_text(json.dumps([asdict(c) for c in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
