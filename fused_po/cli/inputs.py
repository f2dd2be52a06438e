"""Side inputs of a step: what a loss reads beside the policy's own statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.losses import Loss
from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS
from fused_po.trainers.model import token_stats_of
from fused_po.trainers.preferences import AnswerBatch, TokenPair, mismatched

__all__ = ["SideInputs", "check_trainable", "token_logp"]

_KNOWN = frozenset({"ref_logp", "old_logp", "advantage", "desirable", "kl"})


def check_trainable(loss: Loss) -> None:
    """Whether pairs hold all that a loss reads.

    Raises:
        ValueError: they do not.
    """
    missing = (loss.needs & SIDE_INPUTS) - OPTIONAL - _KNOWN
    if missing:
        raise ValueError(f"loss {loss.name!r} can't be trained from pairs: it needs {', '.join(sorted(missing))}")


def token_logp(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Log-probs of the labels under a model, (2B, S - 1), 0 where ignored."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logp = token_stats_of(model, inputs, batch.labels).logp
    assert logp is not None
    return logp


class SideInputs:
    """Makes the side inputs of any batch of the pairs; the reference is the model as it is when this is made.

    Args:
        loss: decides what is made.
        model: the starting policy.
        pairs: all pairs, whose reference log-probs are computed once.
        batch_size: pairs at a time.
        make: from pairs to a batch on the device.
        advance: called after each batch of pairs.
    """

    def __init__(
        self,
        loss: Loss,
        model: nn.Module,
        pairs: Sequence[TokenPair],
        batch_size: int,
        make: Callable[[Sequence[TokenPair]], AnswerBatch],
        advance: Callable[[int], Any] = lambda count: None,
    ) -> None:
        self._loss, self._make, self._pairs = loss, make, pairs
        # log-probs of the answers' tokens by pair: chosen, rejected
        self._reference: list[tuple[Tensor, Tensor]] = []
        model.eval()
        # only the mismatched pairs of KTO depend on what a batch holds, and so need the starting policy again
        self._start = copy.deepcopy(model) if "kl" in loss.needs else None
        for first in range(0, len(pairs), batch_size):
            part = pairs[first : first + batch_size]
            with torch.no_grad():
                batch = make(part)
                rows = token_logp(model, batch)
            answers = [row[labels != -100].cpu() for row, labels in zip(rows, batch.labels, strict=True)]
            self._reference += zip(answers[: len(part)], answers[len(part) :], strict=True)
            advance(len(part))
        model.train()

    def reference(self, indices: Sequence[int], batch: AnswerBatch) -> Tensor:
        """Reference log-probs in the shape of labels, 0 where ignored."""
        rows = [self._reference[i][side] for side in (0, 1) for i in indices]
        found = torch.zeros(batch.labels.shape, device=batch.labels.device)
        found[batch.labels != -100] = torch.cat(rows).to(found)
        return found

    def __call__(self, indices: Sequence[int], batch: AnswerBatch, model: nn.Module) -> dict[str, Any]:
        """Side inputs of the pairs ``indices``, whose batch this is; ``model`` is the current policy."""
        reference = self.reference(indices, batch)
        count = len(indices)
        sign = torch.ones(2 * count, device=reference.device)
        sign[count:] = -1.0
        made: dict[str, Callable[[], Any]] = {
            "ref_logp": lambda: reference,
            "old_logp": lambda: reference,
            "advantage": lambda: sign,
            "desirable": lambda: sign > 0,
            "kl": lambda: self._reference_point(indices, model),
        }
        return {name: make() for name, make in made.items() if name in self._loss.needs}

    def _reference_point(self, indices: Sequence[int], model: nn.Module) -> Tensor:
        """KTO's z0: the mean log-ratio of mismatched answers, at least 0, as TRL estimates it."""
        assert self._start is not None
        batch = self._make(mismatched([self._pairs[i] for i in indices]))
        with torch.no_grad():
            ratio = token_logp(model, batch).double() - token_logp(self._start, batch)
        return ratio.sum(1).mean().clamp_min(0)
