"""Elements of a tensor in segments: loss tokens of sequences, sequences of groups; sums and scans over each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Segments"]


@dataclass(frozen=True)
class Segments:
    """The K elements of a tensor that count, segment after segment: loss tokens of sequences, sequences of groups."""

    shape: torch.Size  # of the tensor
    index: Tensor  # (K,) positions in the flat tensor
    lengths: Tensor  # (segments,)
    longest: int  # no segment is longer

    def take(self, values: Tensor) -> Tensor:
        """The elements: the tensor's shape -> (K,) float64, detached."""
        return values.detach().reshape(-1)[self.index].double()

    def put(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(K,) -> the tensor's shape, 0 where nothing counts."""
        flat = values.new_zeros(self.shape.numel(), dtype=dtype)
        flat[self.index] = values.to(dtype)
        return flat.reshape(self.shape)

    def left(self) -> Tensor:
        """How many elements stand behind each in its segment, (K,)."""
        count = self.index.shape[0]
        ends = self.lengths.cumsum(0).repeat_interleave(self.lengths, output_size=count)
        return ends - torch.arange(1, count + 1, device=ends.device)

    def following(self, values: Tensor) -> Tensor:
        """The next value of the segment, 0 behind the last: (K,) -> (K,)."""
        return torch.where(self.left() > 0, values.roll(-1), 0.0)

    def discounted(self, values: Tensor, factor: float) -> Tensor:
        """``sum_l factor^l v_{t+l}`` to the end of the segment: (K,) -> (K,).

        By doubling: the sum over 2 s elements is that over s, plus factor^s times that over the next s. A loop over
        tokens would launch thousands of kernels.
        """
        values, left, step = values.clone(), self.left(), 1
        while step < self.longest and factor > 0.0:
            values[:-step] += factor * torch.where(left[:-step] >= step, values[step:], 0.0)
            step, factor = 2 * step, factor * factor
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each segment: (K,) -> (segments,)."""
        return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0.0)

    def spread_sum(self, values: Tensor) -> Tensor:
        """Sum over its segment, for each element: (K,) -> (K,)."""
        return self.sum(values).repeat_interleave(self.lengths, output_size=values.shape[0])

    def centred(self, values: Tensor) -> Tensor:
        """Less the largest value of its segment, where that is finite: equal values become 0 exactly, (K,) -> (K,)."""
        known = torch.where(values.isnan(), -torch.inf, values)
        top = torch.segment_reduce(known, "max", lengths=self.lengths, unsafe=True, initial=-torch.inf)
        top = top.repeat_interleave(self.lengths, output_size=values.shape[0])
        return values - torch.where(top.isfinite(), top, 0.0)

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number, sum and unbiased std (0 of a single one) of its segment's values that are not NaN, each (K,)."""
        known = ~values.isnan()
        count, total = self.spread_sum(known.double()), self.spread_sum(torch.where(known, values, 0.0))
        squares = self.spread_sum(torch.where(known, (values - total / count).square(), 0.0))
        return count, total, (squares / (count - 1.0).clamp_min(1.0)).sqrt()
