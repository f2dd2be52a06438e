"""How much memory G will take, on paper: the same program on tensors that have shapes and no values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_po.diagnostics.alignment import gradient_alignment
from fused_po.diagnostics.examples import Examples
from fused_po.diagnostics.prediction import KERNEL_BLOCKS
from fused_po.ledger import record
from fused_po.losses.contract import Loss
from fused_po.ops.devices import planned_for
from fused_po.trainers.model import token_stats_of

__all__ = ["AlignmentPrediction", "fused_attention", "predict_alignment"]

# whatever their number, parts are measured one after the other
FEW = ("positive", "negative")


@dataclass(frozen=True)
class AlignmentPrediction:
    """Bytes alive at the peak of ``gradient_alignment``.

    Attributes:
        model: parameters and buffers.
        above: what the call takes on top: the gradient of D', copies of what moves, activations, tiles of logits.
    """

    model: int
    above: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.model + self.above


def predict_alignment(
    model: nn.Module,
    batches: Sequence[Examples],
    loss: Loss,
    target: Sequence[Examples],
    *,
    device: str = "cuda",
    **options: Any,
) -> AlignmentPrediction:
    """The memory of ``gradient_alignment`` with the largest batch of D and the largest of D', before anything runs.

    Attention is counted as a fused kernel takes it, without scores of all pairs of tokens, where the model asks for
    torch's. What a library takes for itself is not in it.

    Args:
        model: on ``meta``: ``with torch.device("meta"): AutoModelForCausalLM.from_config(config)``.
        batches, loss, target: as in ``gradient_alignment``; only shapes are read.
        device: the type of the device that it will run on, whose budget for logits counts.
        options: of ``gradient_alignment``; ``parts`` and ``blocks`` change nothing.

    Raises:
        ValueError: a model that is not on ``meta``, and whatever ``gradient_alignment`` raises.
    """
    if any(not p.is_meta for p in model.parameters()):
        raise ValueError('the model must be on "meta": a prediction has no use for values')
    kept = {name: value for name, value in options.items() if name in ("method", "cosine", "reduction")}
    largest = [max(given, key=lambda one: one.labels.numel()).to("meta") for given in (batches, target)]
    with planned_for(torch.device(device).type), warnings.catch_warnings(), record() as ledger, fused_attention():
        # of numbers that are not there
        warnings.simplefilter("ignore")
        stats = partial(token_stats_of, check=False)
        gradient_alignment(model, largest[:1], loss, largest[1:], parts=FEW, stats=stats, **kept)
    held = [*model.parameters(), *model.buffers()]
    blocks = KERNEL_BLOCKS.get(torch.device(device).type, 0)
    return AlignmentPrediction(sum(one.numel() * one.element_size() for one in held), ledger.peak + blocks)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention of torch on tensors without values as its fused kernels take memory: output and a normaliser a row.

    A mode would not do: layers that are run again in the backward are outside of it.
    """
    real = functional.scaled_dot_product_attention

    def on_paper(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not query.is_meta:
            return real(query, key, value, *args, **kwargs)
        return _Attention.apply(query, key, value)

    functional.scaled_dot_product_attention = on_paper
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, found, query.new_empty(query.shape[:-1]))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
