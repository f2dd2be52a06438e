"""What is timed: shapes, data and the loss, and the table of cases by name."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_po import linear_token_stats, make_plan, token_stats
from fused_po.bench.objectives import OBJECTIVES, Objective

__all__ = ["LEAD", "PEAKED", "SPREAD", "Case", "Problem", "choose", "groups"]

BETA = 0.1
# where nothing is subtracted from sums over a sequence, which would saturate every sigmoid
BETA_WITHOUT_REFERENCE = 1e-4
# standard deviation of the logits of wrong classes
SPREAD = 2.0
# share of peaked rows, and how far the label's logit is above the log-sum-exp of the others there
PEAKED, LEAD = 0.8, 2.0
GIB = 1 << 30
# what the timed cases of a GPU may take
GPU_SCRATCH = 5 * GIB // 2


@dataclass(frozen=True)
class Case:
    """T tokens in sequences of ``length``, all of which carry loss.

    Hidden states are normal and weight rows about 1 long, so that wrong logits have standard deviation ``SPREAD``.
    "peaked" adds a multiple of the label's weight row to the hidden state of a random ``PEAKED`` of the rows, which
    brings its probability near 0.88; "flat" adds nothing.

    Attributes:
        loss: a key of ``OBJECTIVES``.
        frozen: the gradient stops at the head.
        from_logits: it starts from logits.
        scratch_bytes: the budget given to this project's operations; None: their default.
    """

    tokens: int
    hidden: int
    vocab: int
    length: int = 1024
    loss: str = "dpo"
    rows: str = "peaked"
    frozen: bool = False
    from_logits: bool = False
    dtype: torch.dtype = torch.float32
    scratch_bytes: int | None = None

    @property
    def name(self) -> str:
        held = "logits" if self.from_logits else "frozen" if self.frozen else "trained"
        shape = f"T{self.tokens}-H{self.hidden}-V{self.vocab}-S{self.length}"
        budget = [] if self.scratch_bytes is None else [f"{self.scratch_bytes / GIB:.3g}GiB"]
        return "-".join([shape, self.loss, self.rows, held, str(self.dtype).removeprefix("torch."), *budget])

    @property
    def gemms(self) -> int:
        """Products of N H V that a call needs at least."""
        return 0 if self.from_logits else 2 if self.frozen else 3

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.loss]


class Problem:
    """The tensors of a case; gradients arrive in ``leaves``."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.beta = case, BETA
        generator = torch.Generator(device).manual_seed(seed)
        count = case.tokens // case.length

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.labels = torch.randint(case.vocab, (count, case.length), generator=generator, device=device)
        self.plan = make_plan(self.labels)
        weight = normal(case.vocab, case.hidden).div_(math.sqrt(case.hidden))
        hidden = normal(count, case.length, case.hidden).mul_(SPREAD)
        if case.rows == "peaked":
            lead = math.log(case.vocab) + SPREAD**2 / 2 + LEAD
            here = torch.rand(self.labels.shape, generator=generator, device=device) < PEAKED
            for sequence, labels, peaked in zip(hidden, self.labels, here, strict=True):
                sequence.addcmul_(weight[labels], (lead * peaked).unsqueeze(1))
        self.weight, self.hidden = weight.to(case.dtype), hidden.to(case.dtype)
        self.logits = self.hidden @ self.weight.t() if case.from_logits else None
        if self.logits is not None:
            logp = token_stats(self.logits, self.labels).logp
            self.leaves = [self.logits]
        else:
            logp = linear_token_stats(self.hidden, self.weight, self.labels, plan=self.plan).logp
            self.leaves = [self.hidden] if case.frozen else [self.hidden, self.weight]
        assert logp is not None
        # the policy of a moment ago, so near that nothing saturates
        self.old_logp = logp + 0.1 * normal(count, case.length)  # (B, S)
        self.ref_token_logp = self.old_logp + 0.1 * normal(count, case.length)  # (B, S)
        self.ref_logp = self.ref_token_logp.double().sum(1)  # (B,)
        self.advantage = normal(count)  # (B,)
        self.desirable = torch.arange(count, device=device) < (count + 1) // 2  # (B,)
        self.kl = torch.tensor(0.5, device=device)
        for leaf in self.leaves:
            leaf.requires_grad_()

    def without_reference(self) -> Problem:
        """The same tensors with reference log-probs of 0, for peers that cannot take them."""
        other = copy.copy(self)
        other.ref_logp, other.beta = torch.zeros_like(self.ref_logp), BETA_WITHOUT_REFERENCE
        return other

    def on_top(self, logp: Tensor, entropy: Tensor | None = None) -> Tensor:
        """The loss of log-probs and entropies (B, S), written out."""
        return self.case.objective.written(self, logp, entropy)


def _heads(cases: Sequence[Case]) -> list[Case]:
    return [replace(case, frozen=frozen) for case in cases for frozen in (False, True)]


def _losses(case: Case, names: Sequence[str] = tuple(OBJECTIVES)) -> list[Case]:
    return [replace(case, loss=name) for name in names]


def groups(device: str) -> dict[str, list[Case]]:
    """Cases by the name of their group.

    Returns:
        ``quick``: a minute; ``full``: everything; ``targets``: the cases that targets are set for; ``pairs``: one DPO
        pair of few and of many tokens, whose memory is compared. On a CPU they are small.
    """
    if device == "cpu":
        small = Case(512, 128, 8000, 128)
        first, others = Case(1024, 256, 16000, 512), [Case(4096, 512, 32000, 2048)]
        targets = _heads(_losses(small, ("dapo", "dpo")))
        pairs = [Case(256, 64, 1000, 128), Case(4096, 64, 1000, 2048)]
        # from where a call's fixed cost shows to where it does not
        quick = [replace(small, vocab=2000), small, replace(small, vocab=32000, loss="dapo")]
        quick += [replace(small, loss="dapo", frozen=True), replace(small, from_logits=True)]
    else:
        bf16 = torch.bfloat16
        first = Case(8192, 4096, 131072, dtype=bf16)
        shapes = [(4096, 4096, 128256), (16384, 2048, 248320), (8192, 4096, 151936), (8192, 2304, 256000)]
        others = [Case(*shape, dtype=bf16) for shape in shapes]
        timed = [replace(case, scratch_bytes=GPU_SCRATCH) for case in (first, *others[:2])]
        targets = [case for shape in timed for case in _heads(_losses(shape, ("dapo", "dpo")))]
        pairs = [replace(first, tokens=tokens, length=tokens // 2) for tokens in (8192, 131072)]
        quick = [first, replace(first, loss="dapo"), replace(first, frozen=True), replace(first, from_logits=True)]
    every = [*_heads(_losses(first)), *(replace(case, rows="flat") for case in _losses(first))]
    every += [replace(first, from_logits=True), replace(first, from_logits=True, loss="ppo")]
    every += [case for shape in others for case in _heads(_losses(shape, ("dapo", "dpo")))]
    return {"quick": quick, "full": [*every, *pairs], "targets": targets, "pairs": pairs}


def choose(names: Sequence[str], device: str) -> list[Case]:
    """Cases by groups, names, or patterns of names (``*dapo*``), each once, in the order of the names.

    Raises:
        ValueError: a name that fits nothing, with the nearest that do.
    """
    known = groups(device)
    by_name = {case.name: case for cases in known.values() for case in cases}
    found: dict[str, Case] = {}
    for name in names:
        cases = known.get(name) or [by_name[one] for one in fnmatch.filter(by_name, name)]
        if not cases:
            near = difflib.get_close_matches(name, [*known, *by_name], 3, 0.4)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(
                f"no case {name!r} on {device}: wanted {', '.join(known)}, or a name that --list prints{hint}"
            )
        found |= {case.name: case for case in cases}
    return list(found.values())
