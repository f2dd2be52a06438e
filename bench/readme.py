"""The figures of README.md: a few lines of docs/performance.md, from the same files, between two marks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.prose import prose
from bench.record_paper import routes, trl_on
from fused_po.bench.paper import CASES
from fused_po.bench.paper_peers import counted_with
from fused_po.prices import device

__all__ = ["README", "block", "with_block"]

README = Path(__file__).resolve().parents[1] / "README.md"
FIRST, LAST = "<!-- written by python -m bench.report -->\n", "<!-- end of what it writes -->\n"
GIB, MIB = 1 << 30, 1 << 20
# of the table on paper, in words
SHOWN = {
    "dpo": "DPO, 8,192 tokens",
    "dapo": "DAPO, 8,192 tokens",
    "dpo-frozen": "DPO, 8,192 tokens, frozen head (LoRA)",
    "pair-131k": "DPO, one pair of 131,072 tokens",
}
METHODS = {"linear_loss": "`linear_loss`", "trl": "TRL's chunked log-probs", "eager": "full logits, plain PyTorch"}


def block(measured: Mapping[str, Any]) -> str:
    """Both tables, marks included.

    Args:
        measured: bench/results/cpu_vs_trl.json, whose first case is shown.
    """
    found, used = routes(), counted_with()
    on = device(found["on_paper"])
    case = CASES["dpo"]
    lines = [
        *prose(
            f"""**On paper, not yet measured: one {on.name.upper()}, bfloat16, H = {case.hidden}, V = {case.vocab:,}.**
            Forward and backward through the head, as a multiple of the time of its bare matrix products (3, with a
            frozen head 2), and memory beyond inputs and gradients. TRL {used["trl"]} is counted in the same way."""
        ),
        "",
        "| | ours | memory | TRL's chunked log-probs | memory |",
        "|---|---|---|---|---|",
    ]
    for name, words in SHOWN.items():
        both = (found["cases"][name], trl_on(on, name))
        cells = [f"{row['over_bare']:.2f} x | {row['scratch_bytes'] / GIB:.2f} GiB" for row in both if row]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    result, machine = measured["results"][0], measured["environment"]
    shape = result["shape"]
    lines += [
        "",
        *prose(
            f"""**Measured: {machine["threads"]} threads of a CPU ({machine["device"]}), {shape["dtype"]}, DPO on
            {shape["tokens"]:,} tokens, H = {shape["hidden"]}, V = {shape["vocab"]:,}, trained head.** The bare products
            take {result["floor"]["ms"]:.0f} ms."""
        ),
        "",
        "| | time | memory |",
        "|---|---|---|",
    ]
    for name, words in METHODS.items():
        row = result["methods"][name]
        lines.append(f"| {words} | {row['ms']:.0f} ms | {row['scratch_bytes'] / MIB:.0f} MiB |")
    return FIRST + "\n" + "\n".join(lines) + "\n\n" + LAST


def with_block(text: str, measured: Mapping[str, Any]) -> str:
    """The README with its figures made anew.

    Raises:
        ValueError: the marks are missing.
    """
    head, first, rest = text.partition(FIRST)
    _, last, tail = rest.partition(LAST)
    if not first or not last:
        raise ValueError(f"README.md has no place for figures: {FIRST.strip()} and {LAST.strip()} are wanted in it")
    return head + block(measured) + tail


def write(results: Path) -> None:
    """Into README.md."""
    measured = json.loads((results / "cpu_vs_trl.json").read_text(encoding="utf-8"))
    README.write_text(with_block(README.read_text(encoding="utf-8"), measured), encoding="utf-8")
