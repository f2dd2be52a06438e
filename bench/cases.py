"""What is timed: shapes, data and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po import linear_token_stats, make_plan, token_stats

BETA, EPSILON = 0.1, 0.2
# standard deviation of the logits of wrong classes
SPREAD = 2.0
# share of peaked rows, and how far the label's logit is above the log-sum-exp of the others there
PEAKED, LEAD = 0.8, 2.0


@dataclass(frozen=True)
class Case:
    """T tokens in sequences of ``length``, all of which carry loss.

    Hidden states are normal and weight rows about 1 long, so that wrong logits have standard deviation ``SPREAD``.
    "peaked" adds a multiple of the label's weight row to the hidden state of a random ``PEAKED`` of the rows, which
    brings its probability near 0.88; "flat" adds nothing.
    """

    tokens: int
    hidden: int
    vocab: int
    length: int = 1024
    loss: str = "sigmoid"
    rows: str = "peaked"
    # the gradient stops at the head, or starts from logits
    frozen: bool = False
    from_logits: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        held = "logits" if self.from_logits else "frozen" if self.frozen else "trained"
        shape = f"T{self.tokens}-H{self.hidden}-V{self.vocab}-S{self.length}"
        return "-".join([shape, self.loss, self.rows, held, str(self.dtype).removeprefix("torch.")])

    @property
    def gemms(self) -> int:
        """Products of N H V that a call needs at least."""
        return 0 if self.from_logits else 2 if self.frozen else 3


class Problem:
    """The tensors of a case; gradients arrive in ``leaves``."""

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case = case
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
        # the policy of a moment ago, so near that nothing saturates
        self.old_logp = logp + 0.1 * normal(count, case.length)
        self.ref_logp = self.old_logp.double().sum(1)
        self.advantage = normal(count)
        for leaf in self.leaves:
            leaf.requires_grad_()

    def on_top(self, logp: Tensor) -> Tensor:
        """The loss of log-probs (B, S), written out: DPO's sigmoid, or DAPO's clipped surrogate."""
        if self.case.loss == "sigmoid":
            chosen, rejected = (logp.sum(1, dtype=torch.float64) - self.ref_logp).chunk(2)
            return F.softplus(-BETA * (chosen - rejected)).mean()
        ratio, advantage = (logp - self.old_logp).exp(), self.advantage.unsqueeze(1)
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage).mean()
