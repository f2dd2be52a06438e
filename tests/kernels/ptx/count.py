"""Instructions and bytes a logit of the row kernels, as the compilers emit them: ``python -m tests.kernels.ptx.count``.

Each kernel runs on one row of two widths with the same geometry; the difference leaves out what a row costs once. An
instruction counts for all 32 lanes of its warp, as the GPU issues it, and where lanes diverge for each of their ways.
Neighbours that read one place count its bytes once. These are PTX instructions without moves, which the assembler
drops; it joins some of the others, and makes several of a division. So the machine code is near to this and not the
same: with a softcap, the loop of row_stats over bfloat16 had 27.2 instructions a logit where 27.5 were counted.

``--write`` keeps the table in ``bench/counts.json``, from which ``bench.report`` takes it, and which no kernel may
exceed.
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
from tests.kernels.ptx.launch_triton import TritonPtx
from tests.kernels.ptx.machine import Counters

__all__ = ["TABLE", "Count", "Line", "count", "lines", "recorded"]

TABLE = Path(__file__).resolve().parents[3] / "bench" / "counts.json"
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# logits, gradient
ELEMENTS = (("bf16", "bf16"), ("fp32", "bf16"))
# whole passes of every geometry, the resident one in clusters of four blocks; and half as much again
BYTES = 3 << 16
# of the gradient, "entropy" means that there is a coefficient for it
WANTED = {"logp": ("logp",), "entropy": ("logp", "entropy"), "everything": STATISTICS}


@dataclass(frozen=True)
class Line:
    """What is counted."""

    backend: str
    kernel: str
    element: str
    out: str
    softcap: bool
    wanted: str

    def __str__(self) -> str:
        capped = "softcap" if self.softcap else "plain"
        return f"{self.backend} {self.kernel} {self.element} {self.out} {capped} {self.wanted}"


@dataclass(frozen=True)
class Count:
    """Of a logit: lane-instructions, those of the special functions among them, bytes of global memory."""

    instructions: float
    special: float
    read: float
    written: float


def lines(backend: str) -> Iterator[Line]:
    for element, out in ELEMENTS:
        for kernel in ("row_stats", "row_softmax", "row_grad"):
            for softcap in (False, True):
                for wanted in ("logp", "entropy") if kernel == "row_grad" else WANTED:
                    yield Line(backend, kernel, element, out, softcap, wanted)


def _launch(line: Line, width: int) -> Counters:
    # these seeds run warps side by side
    backend = CudaPtx("resident", seed=0) if line.backend == "cuda" else TritonPtx(90, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(1, width, generator=generator)).to(FLOATS[line.element])
    out = torch.empty(1, width, dtype=FLOATS[line.out])
    labels, span = torch.tensor([5]), Span(0, width)
    transform = Transform(softcap=30.0 if line.softcap else None)
    if line.kernel == "row_stats":
        backend.row_stats(x, labels, transform, span, WANTED[line.wanted])
    elif line.kernel == "row_softmax":
        backend.row_softmax(x, labels, transform, span, WANTED[line.wanted], out)
    else:
        one = torch.ones(1)
        triple = Coefficients(one, None if line.wanted == "logp" else one, None)
        anchors = torch.tensor([[-5.0], [10.0], [-3.0], [2.0]])
        backend.row_grad(x, labels, transform, span, anchors, triple, out)
    return backend.launches[-1][1]


def count(line: Line) -> Count:
    width = BYTES // FLOATS[line.element].itemsize
    short, long = (_launch(line, w) for w in (width, width * 3 // 2))
    names = ("instructions", "special", "read", "written")
    return Count(*((getattr(long, name) - getattr(short, name)) / (width // 2) for name in names))


def recorded() -> dict[Line, Count]:
    """The table as it was last written."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"]
    split = Line.__dataclass_fields__
    return {
        Line(**{k: v for k, v in row.items() if k in split}): Count(**{k: v for k, v in row.items() if k not in split})
        for row in rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions and bytes a logit of the row kernels, from their PTX.")
    parser.add_argument("--write", action="store_true", help=f"keep the table in bench/{TABLE.name}")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="one of them only")
    given = parser.parse_args()
    before = recorded() if TABLE.exists() else {}
    rows = []
    print("per logit: lane-instructions (as recorded), special functions, bytes read, bytes written")
    for backend in [given.backend] if given.backend else ["cuda", "triton"]:
        for line in lines(backend):
            found = count(line)
            rows.append(asdict(line) | {name: round(value, 3) for name, value in asdict(found).items()})
            was = f"({before[line].instructions:6.2f})" if line in before else "        "
            numbers = f"{found.instructions:7.2f} {was} {found.special:6.2f} {found.read:6.2f} {found.written:6.2f}"
            print(f"{line!s:50} {numbers}", flush=True)
    if given.write:
        if given.backend:
            parser.error("--write takes all backends")
        lines_of_json = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        TABLE.write_text(f'{{\n "kernels": [\n{lines_of_json}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
