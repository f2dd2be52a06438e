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


def spread(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """(B,) -> (N,): each token gets the value of its sequence.

    Args:
        values: (B,), of any dtype.
        segments: (B,) int64, tokens of each sequence.
        count: their sum N.
    """
    if not values.dtype.is_floating_point:
        return values.repeat_interleave(segments, output_size=count)
    return _Spread.apply(values, segments, count)


def sum_segments(values: Tensor, segments: Tensor) -> Tensor:
    """(N,) -> (B,): the sum over each sequence, 0 for an empty one, in the dtype of ``values``."""
    return torch.segment_reduce(values, "sum", lengths=segments, unsafe=True, initial=0.0)


class _Spread(Function):
    """Linear: the backward is the transposed map, in operations that have a derivative themselves.

    No ``jvp``: Dynamo traces none, and sums over sequences have none either.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, segments: Tensor, count: int) -> Tensor:
        return values.repeat_interleave(segments, output_size=count)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (segments,) = ctx.saved_tensors
        return sum_segments(grad, segments), None, None
