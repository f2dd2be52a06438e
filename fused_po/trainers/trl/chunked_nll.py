"""The default loss of SFT in TRL 1.9 to 1.14, which multiplies by the head in chunks and again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from torch import Tensor

from fused_po.ops import linear_token_stats
from fused_po.ops.checks import IGNORE

__all__ = ["NAME", "chunked_nll"]

# in trl.trainer.sft_trainer
NAME = "_chunked_cross_entropy_loss"


def chunked_nll(
    original: Callable[..., Any],
    gather: Callable[..., AbstractContextManager[Any]],
    count: Callable[[], None],
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """What stands in for TRL's function, with its arguments and outputs.

    Args:
        original: TRL's.
        gather: of TRL, ``gather(weight, bias)`` is a context in which a sharded head is whole; entered again in
            backward.
        count: called for each call.
        options: ``backend`` and ``scratch_bytes`` of ``linear_token_stats``.
    """

    @wraps(original)
    def loss(
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        chunk_size: int,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, targets = hidden_states, shift_labels
        if targets is None:
            if labels is None:
                raise ValueError("At least one of `labels` or `shift_labels` must be provided.")
            # (B, S-1, H), (B, S-1)
            hidden, targets = hidden_states[..., :-1, :], labels[..., 1:]
        count()
        with gather(lm_head_weight, lm_head_bias):
            found = linear_token_stats(
                hidden,
                lm_head_weight,
                targets,
                bias=lm_head_bias,
                outputs=("logp", "entropy", "is_top1"),
                logit_scale=logit_scale,
                softcap=final_logit_softcapping,
                gather=gather,
                **options,
            )
        assert found.logp is not None and found.entropy is not None and found.is_top1 is not None
        valid = targets != IGNORE
        tokens = valid.sum()
        items = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if isinstance(items, Tensor):
            items = items.to(found.logp.device)
        top = (found.is_top1 & valid).sum().float()
        return -found.logp.sum() / items, top, found.entropy.detach().sum(), tokens

    return loss
