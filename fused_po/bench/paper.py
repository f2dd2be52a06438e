"""Cases that are priced on paper: calls on tensors without values, beside the bare products that they need at least."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_po import linear_loss, linear_token_stats, losses, make_plan
from fused_po.bench.measure import FLOOR_ROWS, Call, bare_products, interleaved
from fused_po.ledger import Ledger, autocast, record
from fused_po.losses import Loss
from fused_po.prices import Device

__all__ = ["CASES", "PaperCall", "PaperCase", "Sheet", "choose", "measured", "sheet"]


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
    # tiles of all rows would be 7.6 GiB: two thirds of the logits are made again
    "stats-v248320": replace(_STATS, tokens=16384, hidden=2048, vocab=248320, sequences=16),
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


class PaperCall:
    """The tensors of a case on a device, without values on ``meta``, and the call on them.

    Attributes:
        leaves: hidden states (B, S, H), and the weight (V, H) of a trained head; gradients arrive there.
    """

    def __init__(self, case: PaperCase, device: str) -> None:
        self.case, self.device = case, device
        stored = torch.float32 if case.autocast else case.dtype
        shape = (case.sequences, case.tokens // case.sequences)
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            if device == "meta":
                return torch.empty(size, dtype=dtype, device=device)
            return torch.randn(size, generator=generator, device=device).to(dtype)

        self.hidden = normal(*shape, case.hidden, dtype=stored)
        self.weight = normal(case.vocab, case.hidden, dtype=stored)
        if device == "meta":
            self.labels = torch.empty(shape, dtype=torch.int64, device=device)
        else:
            self.weight /= case.hidden**0.5
            self.labels = torch.randint(case.vocab, shape, generator=generator, device=device)
        self.per_token, self.per_sequence = normal(*shape), normal(shape[0])
        self.plan, self.head = make_plan(self.labels), (self.hidden, self.weight, self.labels)
        self.leaves = [self.hidden] if case.frozen else [self.hidden, self.weight]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def __call__(self) -> None:
        """Forward and backward; gradients of before are gone."""
        for leaf in self.leaves:
            leaf.grad = None
        with self._autocast():
            if self.case.method == "linear_loss":
                self._loss()
            else:
                self._statistics()

    def returned(self) -> list[Tensor]:
        """The gradients."""
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.case.autocast:
            return nullcontext()
        return autocast(self.case.dtype) if self.device == "meta" else torch.autocast(self.device, self.case.dtype)

    def _loss(self) -> None:
        pairs = {"ref_logp": self.per_sequence}
        tokens = {"old_logp": self.per_token, "advantage": self.per_sequence}
        given: dict[str, Any] = pairs if self.case.loss == "dpo" else tokens
        loss = LOSSES[self.case.loss]()
        linear_loss(*self.head, loss, softcap=self.case.softcap, plan=self.plan, **given).loss.backward()

    def _statistics(self) -> None:
        outputs = ("logp", "entropy") if self.case.entropy else ("logp",)
        stats = linear_token_stats(*self.head, outputs=outputs, softcap=self.case.softcap, plan=self.plan)
        torch.autograd.backward([*stats.present().values()], [self.per_token] * len(outputs))


def sheet(case: PaperCase) -> Sheet:
    """Run a case on tensors without values."""
    call = PaperCall(case, "meta")
    with record() as ledger:
        call()
    return Sheet(case, ledger, ledger.scratch(call.returned()))


def measured(case: PaperCase, device: str, seconds: float = 3.0) -> dict[str, float]:
    """Run a case on a device, in turns with its bare products: ``ms``, ``bare_ms``, ``over_bare``."""
    call = PaperCall(case, device)
    hidden, weight = (t.detach().to(case.dtype) for t in (call.hidden.flatten(0, 1)[:FLOOR_ROWS], call.weight))
    calls: dict[str, Call] = {"ours": call, "bare": bare_products(hidden, weight, case.gemms)}
    times = {name: statistics.median(found) for name, found in interleaved(calls, device, seconds).items()}
    floor = times["bare"] * case.tokens / hidden.shape[0]
    return {"ms": 1e3 * times["ours"], "bare_ms": 1e3 * floor, "over_bare": times["ours"] / floor}


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
