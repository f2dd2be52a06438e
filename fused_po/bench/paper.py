"""Cases that are priced on paper: calls on tensors without values, beside the bare products that they need at least.

python -m fused_po.bench.paper [--device h200] [names or patterns]
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_po import linear_loss, linear_token_stats, losses, make_plan
from fused_po.ledger import Ledger, autocast, record
from fused_po.losses import Loss
from fused_po.prices import DEVICES, Device, device

__all__ = ["CASES", "PaperCase", "Sheet", "choose", "sheet"]


@dataclass(frozen=True)
class PaperCase:
    """A forward and backward through the head.

    Attributes:
        method: ``linear_loss`` or ``linear_token_stats``, whose statistics get gradients of their own.
        loss: of ``linear_loss``, a key of ``LOSSES``.
        tokens, hidden, vocab: N, H, V.
        sequences: of equal length; pairs are two of them.
        dtype: of products: that of the tensors, or with ``autocast`` that of a float32 head and hidden states.
        entropy: statistics get a gradient through the entropy too.
        limit: the price over that of the bare products that is not to be passed on an H200, launches not counted.
    """

    method: str
    loss: str = "dapo"
    tokens: int = 8192
    hidden: int = 4096
    vocab: int = 131072
    sequences: int = 8
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    frozen: bool = False
    entropy: bool = False
    softcap: float | None = None
    limit: float | None = None

    @property
    def gemms(self) -> int:
        """Products of N H V that no method can do without."""
        return 2 if self.frozen else 3

    @property
    def bare(self) -> int:
        """FLOP of those products."""
        return self.gemms * 2 * self.tokens * self.hidden * self.vocab


_STATS = PaperCase("linear_token_stats")
_LOSS = PaperCase("linear_loss")
CASES: dict[str, PaperCase] = {
    "dapo": replace(_LOSS, limit=1.10),
    "dpo": replace(_LOSS, loss="dpo", limit=1.10),
    "dapo-fp16": replace(_LOSS, dtype=torch.float16, limit=1.15),
    "dpo-fp16": replace(_LOSS, loss="dpo", dtype=torch.float16, limit=1.15),
    "stats": replace(_STATS, limit=1.08),
    "dapo-fp32-autocast": replace(_LOSS, autocast=True, limit=1.25),
    "dpo-fp32-autocast": replace(_LOSS, loss="dpo", autocast=True, limit=1.25),
    "stats-fp32-autocast": replace(_STATS, autocast=True, limit=1.40),
    "ppo-entropy": replace(_LOSS, loss="ppo-entropy", limit=1.15),
    "stats-entropy": replace(_STATS, entropy=True, limit=1.15),
    "stats-entropy-softcap": replace(_STATS, entropy=True, softcap=30.0, limit=1.50),
    "dapo-frozen": replace(_LOSS, frozen=True, limit=1.08),
    "dpo-frozen": replace(_LOSS, loss="dpo", frozen=True, limit=1.08),
    "stats-frozen": replace(_STATS, frozen=True, limit=1.08),
    "dapo-v128256": replace(_LOSS, tokens=4096, vocab=128256, sequences=4, limit=1.12),
    "stats-v128256": replace(_STATS, tokens=4096, vocab=128256, sequences=4, limit=1.12),
    "dapo-v248320": replace(_LOSS, tokens=16384, hidden=2048, vocab=248320, sequences=16, limit=1.20),
    "stats-v248320": replace(_STATS, tokens=16384, hidden=2048, vocab=248320, sequences=16, limit=1.20),
    "pair-16k": replace(_LOSS, loss="dpo", tokens=16384, sequences=2, limit=1.10),
    "pair-131k": replace(_LOSS, loss="dpo", tokens=131072, sequences=2, limit=1.10),
    "dapo-small": replace(_LOSS, tokens=512, vocab=32000, sequences=4, limit=1.40),
    "dpo-small": replace(_LOSS, loss="dpo", tokens=512, vocab=32000, sequences=4, limit=1.40),
    "stats-small": replace(_STATS, tokens=512, vocab=32000, sequences=4, limit=1.40),
}

LOSSES: dict[str, Callable[[], Loss]] = {
    "dapo": lambda: losses.create("dapo"),
    "dpo": lambda: losses.create("sigmoid"),
    "ppo-entropy": lambda: losses.create("ppo", entropy_coef=0.01),
}


@dataclass(frozen=True)
class Sheet:
    """A case on paper.

    Attributes:
        ledger: what it makes the device do.
        scratch: bytes at the peak beyond inputs and returned gradients.
    """

    case: PaperCase
    ledger: Ledger
    scratch: int

    def over_bare(self, on: Device, **options: bool) -> float:
        """The price over that of the bare products."""
        return self.ledger.seconds(on, **options) * on.half / self.case.bare


def sheet(case: PaperCase) -> Sheet:
    """Run a case on tensors without values."""
    stored = torch.float32 if case.autocast else case.dtype
    shape = (case.sequences, case.tokens // case.sequences)

    def empty(*size: int, dtype: torch.dtype = stored) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    hidden = empty(*shape, case.hidden).requires_grad_()
    weight = empty(case.vocab, case.hidden).requires_grad_(not case.frozen)
    labels = empty(*shape, dtype=torch.int64)
    given: dict[str, Any] = {"softcap": case.softcap, "plan": make_plan(labels)}
    per_token, per_sequence = empty(*shape, dtype=torch.float32), empty(shape[0], dtype=torch.float32)
    with autocast(case.dtype) if case.autocast else nullcontext():
        if case.method == "linear_loss":
            pairs = {"ref_logp": per_sequence}
            tokens = {"old_logp": per_token, "advantage": per_sequence}
            given |= pairs if case.loss == "dpo" else tokens
            loss = LOSSES[case.loss]()
            with record() as ledger:
                linear_loss(hidden, weight, labels, loss, **given).loss.backward()
        else:
            outputs = ("logp", "entropy") if case.entropy else ("logp",)
            with record() as ledger:
                stats = linear_token_stats(hidden, weight, labels, outputs=outputs, **given)
                torch.autograd.backward([*stats.present().values()], [per_token] * len(outputs))
    returned = [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]
    return Sheet(case, ledger, ledger.scratch(returned))


def choose(patterns: Sequence[str]) -> dict[str, PaperCase]:
    """Cases by names or patterns, all without one.

    Raises:
        ValueError: a pattern that fits none.
    """
    if not patterns:
        return CASES
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise ValueError(f"no case {pattern!r} on paper: wanted some of {', '.join(CASES)}")
    return {name: case for name, case in CASES.items() if any(fnmatch.fnmatch(name, one) for one in patterns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names or patterns, default all")
    parser.add_argument("--device", choices=tuple(DEVICES), default="h200")
    parser.add_argument("--lines", type=int, default=0, metavar="COUNT", help="also the dearest lines of each")
    arguments = parser.parse_args()
    on = device(arguments.device)
    print(f"on paper, {on.name}: price over bare products (limit) | accumulators hidden | with launches")
    for name, case in choose(arguments.cases).items():
        found = sheet(case)
        ledger = found.ledger
        print(
            f"{name:22s} {found.over_bare(on):.3f} ({case.limit})  {found.over_bare(on, hidden=True):.3f}  "
            f"{found.over_bare(on, launches=True):.3f}  {len(ledger.products)} products  {ledger.launches} launches  "
            f"{ledger.waits} waits  {found.scratch / 2**30:.2f} GiB"
        )
        for line in ledger.dearest(on, arguments.lines):
            print(f"    {1e3 * line['seconds']:9.3f} ms  {line['line']}  {line['name']} x{line['times']}")


if __name__ == "__main__":
    main()
