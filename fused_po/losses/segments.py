"""Values of sequences at each of their tokens, with a backward that is a sum over a sequence in order.

``repeat_interleave`` has the same values, but its backward adds with atomics on a GPU: two runs would differ in their
last bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["spread", "sum_segments"]


def spread(
    values: Tensor, segments: Tensor, count: int, sequence_of: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """(B,) -> (N,): each token gets the value of its sequence.

    Args:
        values: (B,), of any dtype.
        segments: (B,) int64, tokens of each sequence.
        count: their sum N.
        sequence_of: (N,) int64, the sequence of each token, where it is known.
        offsets: (B + 1,) int64, the first token of each sequence and N, where they are known.
    """
    if not values.dtype.is_floating_point:
        return _spread(values, segments, count, sequence_of)
    return _Spread.apply(values, segments, count, sequence_of, offsets)


def sum_segments(values: Tensor, segments: Tensor, offsets: Tensor | None = None) -> Tensor:
    """(N,) -> (B,): the sum over each sequence, 0 for an empty one, in the dtype of ``values``."""
    lengths = segments if offsets is None else None
    return torch.segment_reduce(values, "sum", lengths=lengths, offsets=offsets, unsafe=True, initial=0.0)


def _spread(values: Tensor, segments: Tensor, count: int, sequence_of: Tensor | None) -> Tensor:
    if sequence_of is None:
        return values.repeat_interleave(segments, output_size=count)
    # one launch where that takes several
    return values.index_select(0, sequence_of)


class _Spread(Function):
    """Linear: the backward is the transposed map, in operations that have a derivative themselves.

    No ``jvp``: Dynamo traces none, and sums over sequences have none either.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor, segments: Tensor, count: int, sequence_of: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        return _spread(values, segments, count, sequence_of)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        segments, offsets = ctx.saved_tensors
        return sum_segments(grad, segments, offsets), None, None, None, None
