"""Where the loss tokens are, and how a call is cut into chunks of whole horizons.

This is the only place that synchronises with the host, once per call; a ``Plan`` made from the labels on the host (in
the collator) removes that too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fused_po.ops.checks import IGNORE, check_cu_seqlens
from fused_po.ops.devices import has_values
from fused_po.ops.explain import explain

__all__ = ["Chunk", "Plan", "Rows", "cut", "make_plan", "static_plan", "steps"]

Range = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Where the loss tokens of a batch are: its *rows*. Make one with ``make_plan``.

    Attributes:
        rows: (N,) int64, positions of the loss tokens in the flattened labels, sequence after sequence; None: every
            position is a row.
        segments: (B,) int64, the number of rows of each sequence, on the device of the labels.
        lengths: the same on the host; None: all sequences have the length that the shape of the labels says.
        positions: number of positions of the labels.
        masked: True if some rows carry no loss and are to be masked (a plan from shapes alone).
        offsets: (B + 1,) int64, the first row of each sequence and N, on the device of the labels; None where lengths
            are not known.
    """

    rows: Tensor | None  # (N,)
    segments: Tensor  # (B,)
    lengths: tuple[int, ...] | None
    positions: int
    masked: bool = False
    offsets: Tensor | None = None

    def explain(self, hidden_size: int, vocab_size: int, **options: Any) -> str:
        """How a call on this plan goes through a head (V, H), in words: what is kept, how many GEMMs it takes, the
        memory at the peak, and the time on paper, computed from rates of a GPU and not measured.

        Args:
            hidden_size: H.
            vocab_size: V.
            options: ``operation``, ``dtype``, ``weight_dtype``, ``trainable``, ``device``, ``scratch_bytes``, see
                ``fused_po.ops.explain``.
        """
        return explain(self.count, hidden_size, vocab_size, **options)

    @property
    def count(self) -> int:
        """N, the rows."""
        return self.positions if self.lengths is None else sum(self.lengths)

    @property
    def batch(self) -> int:
        """B, the sequences."""
        return self.segments.shape[0] if self.lengths is None else len(self.lengths)


@dataclass(frozen=True)
class Rows:
    """Some of the planned rows: ranges in planned order, which ``positions`` maps to the flattened labels."""

    ranges: tuple[Range, ...]
    positions: Tensor | None  # (N,)

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def part(self, first: int, last: int) -> Rows:
        """Rows [first, last) of these."""
        ranges, offset = [], 0
        for start, stop in self.ranges:
            low, high = max(first - offset, 0), min(last - offset, stop - start)
            if low < high:
                ranges.append((start + low, start + high))
            offset += stop - start
        return Rows(tuple(ranges), self.positions)

    def take(self, planned: Tensor) -> Tensor:
        """From planned order: (N, ...) -> (R, ...); a view where the rows are contiguous."""
        return _join([planned[start:stop] for start, stop in self.ranges], planned)

    def gather(self, flat: Tensor) -> Tensor:
        """From the caller's order: (all positions, ...) -> (R, ...)."""
        if self.positions is None:
            return self.take(flat)
        return flat.index_select(0, self.take(self.positions))

    def vectors(self, hidden: Tensor) -> Tensor:
        """``gather`` from (all positions, H), or from (B, S, H) with gaps in memory, which is not copied: (R, H)."""
        if hidden.ndim == 2:
            return self.gather(hidden)
        places = self.positions
        if places is None:
            places = torch.arange(hidden.shape[:2].numel(), device=hidden.device)
        places, length = self.take(places), hidden.shape[1]
        return hidden[places // length, places % length]

    def window(self, flat: Tensor) -> Tensor | None:
        """The view of flat (all positions, ...) that is these rows, where there is one: (R, ...)."""
        if self.positions is not None or len(self.ranges) != 1:
            return None
        ((start, stop),) = self.ranges
        return flat[start:stop]

    def scatter(self, flat: Tensor, values: Tensor) -> None:
        """Into the caller's order: values (R, ...) into flat (all positions, ...)."""
        if self.positions is not None:
            flat.index_copy_(0, self.take(self.positions), values.to(flat.dtype))
            return
        offset = 0
        for start, stop in self.ranges:
            flat[start:stop] = values[offset : offset + stop - start]
            offset += stop - start


@dataclass(frozen=True)
class Chunk:
    """Whole horizons: their rows, and the sequences these belong to (none where the horizon is a token)."""

    rows: Rows
    sequences: tuple[Range, ...]


def make_plan(labels: Tensor, *, cu_seqlens: Tensor | None = None, device: torch.device | str | None = None) -> Plan:
    """Find the loss tokens of a batch, once for all calls on it.

    It waits for labels on a GPU, so make it where they are on the host: in the data collator.

    Args:
        labels: (B, S) or, with ``cu_seqlens``, packed (N,), int64, -100 ignored, already shifted.
        cu_seqlens: (B + 1,) int, cumulative lengths of packed sequences from 0 to N; None with 1-D labels: one
            sequence.
        device: where the plan will be used, default that of ``labels``.

    Raises:
        ValueError: wrong shapes, or ``cu_seqlens`` that does not run from 0 to N without decreasing.
    """
    device = labels.device if device is None else torch.device(device)
    # labels without values: every position is a row
    loss = (
        labels.detach().to("cpu") != IGNORE
        if has_values(labels)
        else torch.ones(labels.shape, dtype=torch.bool, device="cpu")
    )
    if labels.ndim == 2 and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens goes with packed labels (N,): got labels {tuple(labels.shape)}")
    if labels.ndim == 2:
        lengths = loss.sum(1)
    else:
        bounds = check_cu_seqlens(cu_seqlens, labels.shape[0])
        counts = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), loss.cumsum(0)])
        lengths = counts[bounds[1:]] - counts[bounds[:-1]]
    loss = loss.reshape(-1)
    rows = None if bool(loss.all()) else loss.nonzero().squeeze(1).to(device, non_blocking=True)
    on_host = tuple(lengths.tolist())
    # here, since a graph that is captured can't copy from the host
    offsets = torch.tensor([0, *accumulate(on_host)], device="cpu").to(device, non_blocking=True)
    return Plan(rows, lengths.to(device, non_blocking=True), on_host, labels.numel(), offsets=offsets)


def static_plan(labels: Tensor, packed: bool) -> Plan:
    """A plan from shapes alone, for tracing and capture: every position is a row, those without loss are masked.

    Raises:
        ValueError: packed sequences, whose lengths are data.
    """
    if labels.ndim == 1 and packed:
        raise ValueError(
            "packed sequences can't be planned while tracing: make the plan before, with make_plan, and pass plan="
        )
    batch, length = (1, labels.shape[0]) if labels.ndim == 1 else labels.shape
    segments = torch.full((batch,), length, dtype=torch.int64, device=labels.device)
    return Plan(None, segments, None, labels.numel(), masked=True)


def default_plan(labels: Tensor, cu_seqlens: Tensor | None) -> Plan:
    """The plan of a call without one: of shapes alone where values can't be looked at."""
    return static_plan(labels, cu_seqlens is not None) if blind(labels) else make_plan(labels, cu_seqlens=cu_seqlens)


def blind(labels: Tensor) -> bool:
    """Values can't be looked at: in traces and captures."""
    return torch.compiler.is_compiling() or (labels.is_cuda and torch.cuda.is_current_stream_capturing())


def cut(plan: Plan, horizon: str, capacity: int) -> list[Chunk]:
    """Cut a call into chunks of whole horizons of at most ``capacity`` rows; a larger horizon is a chunk of its own.

    Raises:
        ValueError: pairs wanted of an odd number of sequences.
    """
    if horizon == "token":
        parts = steps(0, plan.count, max(1, capacity))
        return [Chunk(Rows((part,), plan.rows), ()) for part in parts]
    # not by a remainder, which a trace does not take of a size
    if horizon == "pair" and plan.batch // 2 * 2 != plan.batch:
        raise ValueError(f"pairs need an even number of sequences, chosen then rejected: got {plan.batch}")
    # a group of prompts is part of the batch: the whole call is the safe superset
    every: tuple[Range, ...] = ((0, plan.batch),)
    sides = [every]
    if horizon in ("sequence", "pair") and plan.count > capacity:
        half = plan.batch // 2 if horizon == "pair" else 0
        groups = _groups(plan, half, capacity)
        if len(groups) != 1:
            # one group that holds everything keeps the order of the call
            sides = [((a, b), (half + a, half + b)) if half else ((a, b),) for a, b in groups]
    return [Chunk(Rows(_row_ranges(plan, ranges), plan.rows), ranges) for ranges in sides]


def _groups(plan: Plan, half: int, capacity: int) -> list[Range]:
    """Consecutive sequences, or pairs of those that lie ``half`` of them apart, of at most ``capacity`` rows."""
    if plan.lengths is None:
        each = plan.positions // max(1, plan.batch) * (2 if half else 1)
        return list(steps(0, half or plan.batch, max(1, capacity // max(1, each))))
    lengths = plan.lengths
    sizes = [lengths[i] + lengths[half + i] for i in range(half)] if half else list(lengths)
    return _greedy(sizes, capacity)


def steps(first: int, last: int, step: int) -> Iterator[Range]:
    """[first, last) in ranges of at most ``step``; ``range`` would tie a traced graph to one length, a comparison
    does not.
    """
    while first < last:
        stop = min(first + step, last)
        yield first, stop
        first = stop


def _row_ranges(plan: Plan, sequences: Sequence[Range]) -> tuple[Range, ...]:
    if plan.lengths is None:
        each = plan.positions // max(1, plan.batch)
        return tuple((first * each, last * each) for first, last in sequences)
    offsets = [0, *accumulate(plan.lengths)]
    return tuple((offsets[first], offsets[last]) for first, last in sequences)


def _greedy(sizes: list[int], capacity: int) -> list[Range]:
    """Consecutive groups of sizes that sum to at most ``capacity``, or hold one size."""
    groups: list[Range] = []
    first, filled = 0, 0
    for index, size in enumerate(sizes):
        if index > first and filled + size > capacity:
            groups.append((first, index))
            first, filled = index, 0
        filled += size
    if first < len(sizes):
        groups.append((first, len(sizes)))
    return groups


def _join(pieces: list[Tensor], like: Tensor) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else like[:0]
