"""From a call's labels and side inputs to the ``Batch`` that a loss sees, of the whole call and of a chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_po.losses.batch import PER_SEQUENCE, SCALAR, SPREAD, SUMMED, TOKEN_FLAGS, Batch
from fused_po.ops.checks import (
    IGNORE,
    check_cu_seqlens,
    looks_at,
    require_number,
    require_real,
    require_said,
    require_tensors,
    same_device,
)
from fused_po.ops.planning import Chunk, Plan, Rows
from fused_po.stats import Stats

__all__ = ["Layout", "Number", "call_batch", "chunk_batch", "masked_stats"]

Number = int | float | Tensor


@dataclass(frozen=True)
class Layout:
    """A planned call: its rows in order, and the sequence of each.

    Attributes:
        labels: labels as the caller gave them, (B, S) or (N,).
        rows: all planned rows.
        row_labels: (N,) labels of the rows.
        segments: (B,) rows of each sequence.
        lengths: the same on the host, where they are known.
        offsets: (B + 1,) the first row of each sequence and N; None where lengths are not known, and in a trace.
        sequence_of: (N,) the sequence of each row.
        mask: (N,) True where a row carries loss; None where all do.
    """

    labels: Tensor
    rows: Rows
    row_labels: Tensor  # (N,)
    segments: Tensor  # (B,)
    lengths: tuple[int, ...]
    offsets: Tensor | None  # (B + 1,)
    sequence_of: Tensor  # (N,)
    mask: Tensor | None  # (N,)

    @staticmethod
    def of(labels: Tensor, plan: Plan, cu_seqlens: Tensor | None = None) -> Layout:
        """Lay out labels by a plan, which must agree with ``cu_seqlens`` where these are given beside it.

        Raises:
            ValueError: a plan of other labels or sequences; that other positions carry loss is noticed on a CPU, or
                with ``FUSED_PO_CHECK=1``, and so are other boundaries of as many sequences, unless all labels carry
                loss and ``cu_seqlens`` is on the CPU.
        """
        if plan.positions != labels.numel() or plan.segments.device != labels.device:
            raise ValueError(
                f"the plan is of {plan.positions} labels on {plan.segments.device}: "
                f"got {labels.numel()} on {labels.device}"
            )
        if labels.ndim == 2 and plan.batch != labels.shape[0]:
            raise ValueError(f"the plan is of {plan.batch} sequences: got labels {tuple(labels.shape)}")
        count, segments = plan.count, plan.segments
        rows = Rows(((0, count),), plan.rows)
        row_labels = rows.gather(labels.reshape(-1))
        # lengths of a plan would tie a trace to them
        offsets = None if torch.compiler.is_compiling() else plan.offsets
        if offsets is None:
            sequence_of = torch.repeat_interleave(segments, output_size=count)
        else:
            sequence_of = torch.searchsorted(offsets[1:], torch.arange(count, device=labels.device), right=True)
        mask = row_labels != IGNORE if plan.masked else None
        if mask is None and looks_at(labels):
            kept = labels != IGNORE
            moved = bool((row_labels == IGNORE).any()) or int(kept.sum()) != count
            if moved or (labels.ndim == 2 and not torch.equal(kept.sum(1), segments)):
                raise ValueError("the plan is of labels with other loss tokens")
        if cu_seqlens is not None:
            _check_bounds(cu_seqlens, labels, plan)
        return Layout(labels, rows, row_labels, segments, plan.lengths or (), offsets, sequence_of, mask)

    def fill(self, values: Tensor) -> Tensor:
        """Row values (N,) in the shape of labels, 0 where there is no loss; differentiable."""
        if self.mask is not None:
            values = torch.where(self.mask, values, torch.zeros_like(values))
        if self.rows.positions is not None:
            flat = values.new_zeros(self.labels.numel())
            values = flat.index_copy(0, self.rows.positions, values)
        return values.reshape(self.labels.shape)


def call_batch(
    layout: Layout,
    side_inputs: Mapping[str, Number],
    num_items: Number | None,
    num_sequences: Number | None,
    dtype: torch.dtype,
    num_chosen_items: Number | None = None,
) -> Batch:
    """The batch of the whole call.

    Args:
        layout: the planned call.
        side_inputs: by name; see ``fused_po.losses.batch`` for the shapes of each.
        num_items: number of loss tokens to normalise by; None counts those of the call.
        num_sequences: number of sequences to normalise by; None counts those of the call.
        dtype: of side inputs that are given per token; others become float64.
        num_chosen_items: number of loss tokens of chosen answers to normalise by; None counts those of the call.

    Raises:
        ValueError: a side input of another shape, dtype or device than its name allows.
    """
    count = layout.segments.shape[0]
    device = layout.labels.device
    lengths, own_tokens, own_chosen = _counted(layout)
    items = own_tokens if num_items is None else _normaliser("num_items", num_items, device)
    sequences = _normaliser("num_sequences", max(count, 1) if num_sequences is None else num_sequences, device)
    share = sequences / max(count, 1)
    chosen_items = own_chosen * share
    if num_chosen_items is not None:
        chosen_items = _normaliser("num_chosen_items", num_chosen_items, device)
    # what is known on the host is filled in, equal numbers once
    known: dict[float, Tensor] = {}

    def filled(number: Number) -> Tensor:
        if isinstance(number, Tensor):
            return number
        if torch.compiler.is_compiling():
            # a key would tie the trace to its value
            return _number(number, device)
        if number not in known:
            known[number] = _number(number, device)
        return known[number]

    per_token: dict[str, Tensor] = {}
    per_sequence: dict[str, Tensor] = {}
    scalars: dict[str, Tensor] = {}
    for name, value in side_inputs.items():
        tensor, by_token = _side_input(name, value, layout)
        if name in SCALAR:
            scalars[name] = tensor.double()
        elif by_token:
            rows = layout.rows.gather(tensor.reshape(-1))
            rows = rows if name in TOKEN_FLAGS else rows.to(dtype)
            # what stands at masked positions must not reach a sum, not even as 0 * nan
            per_token[name] = rows if layout.mask is None else torch.where(layout.mask, rows, torch.zeros_like(rows))
        elif name in PER_SEQUENCE:
            per_sequence[name] = tensor
        else:
            per_sequence[name] = tensor.double()
            if name in SPREAD:
                # in float64 as it is
                per_token[name] = per_sequence[name].index_select(0, layout.sequence_of)
    return Batch(
        segments=layout.segments,
        lengths=lengths,
        chosen=layout.sequence_of < count // 2,
        token_lengths=lengths.index_select(0, layout.sequence_of),
        num_tokens=filled(items),
        num_sequences=filled(sequences),
        num_call_tokens=filled(own_tokens * share),
        num_chosen_tokens=filled(chosen_items),
        own_tokens=filled(own_tokens),
        some_empty=layout.mask is not None or torch.compiler.is_compiling() or min(layout.lengths, default=0) == 0,
        mask=layout.mask,
        offsets=layout.offsets,
        sequence_of=layout.sequence_of,
        per_token=per_token,
        per_sequence=per_sequence,
        scalars=scalars,
    )


def chunk_batch(batch: Batch, chunk: Chunk) -> Batch:
    """The part of a call's batch that a chunk of whole horizons sees; normalisers stay those of the call."""
    take = chunk.rows.take
    by_sequence = Rows(chunk.sequences, None).take
    # single tokens belong to no sequence here, so what is per sequence stays as it is and can only be refused
    per_sequence = (
        {name: by_sequence(v) for name, v in batch.per_sequence.items()} if chunk.sequences else batch.per_sequence
    )
    # sequences of a part would have to be numbered anew
    whole = chunk.sequences == ((0, batch.segments.shape[0]),)
    return replace(
        batch,
        offsets=batch.offsets if whole else None,
        sequence_of=batch.sequence_of if whole else None,
        segments=by_sequence(batch.segments),
        lengths=by_sequence(batch.lengths),
        chosen=take(batch.chosen),
        token_lengths=take(batch.token_lengths),
        mask=None if batch.mask is None else take(batch.mask),
        per_token={name: take(v) for name, v in batch.per_token.items()},
        per_sequence=per_sequence,
    )


def masked_stats(stats: Stats, mask: Tensor | None) -> Stats:
    """Statistics with 0 at masked rows, so that no value there reaches a gradient."""
    if mask is None:
        return stats
    return Stats(**{name: torch.where(mask, v, torch.zeros_like(v)) for name, v in stats.present().items()})


def _check_bounds(cu_seqlens: Tensor, labels: Tensor, plan: Plan) -> None:
    """Raise ValueError where a plan is of other sequences than ``cu_seqlens``."""
    if cu_seqlens.numel() != plan.batch + 1:
        raise ValueError(f"the plan is of {plan.batch} sequences: got {cu_seqlens.numel() - 1} in cu_seqlens")
    if looks_at(labels):
        bounds = check_cu_seqlens(cu_seqlens, labels.numel())
        before = torch.nn.functional.pad((labels.cpu() != IGNORE).cumsum(0), (1, 0))
        lengths = before[bounds].diff()
    elif cu_seqlens.device.type == "cpu" and plan.rows is None and not torch.compiler.is_compiling():
        lengths = check_cu_seqlens(cu_seqlens, labels.numel()).diff()
    else:
        return
    if plan.lengths is not None and lengths.tolist() != list(plan.lengths):
        raise ValueError(
            f"the plan is of other sequences than cu_seqlens, of {list(plan.lengths)[:8]} loss tokens: got "
            f"{lengths.tolist()[:8]}"
        )


def _side_input(name: str, value: Number, layout: Layout) -> tuple[Tensor, bool]:
    """A side input in the shape that it is read in, and whether it is one per token, in the shape of labels."""
    labels, count = layout.labels, layout.segments.shape[0]
    if not isinstance(value, Tensor):
        if name in SCALAR and isinstance(value, (int, float)):
            return _number(value, labels.device), False
        raise ValueError(f"{name} must be a tensor: got {type(value).__name__}")
    require_tensors(**{name: value})
    same_device(labels, **{name: value})
    if name in PER_SEQUENCE or name in TOKEN_FLAGS:
        if value.dtype != torch.bool:
            raise ValueError(f"{name} must be bool: got {value.dtype}")
    else:
        require_real(**{name: value})
    if name in SCALAR:
        # a one-element vector is what a mean with keepdim leaves
        if value.numel() != 1:
            raise ValueError(f"{name} must have shape (): got {tuple(value.shape)}")
        return value.detach().reshape(()), False
    shapes: dict[bool, tuple[int, ...]] = {} if name in TOKEN_FLAGS else {False: (count,)}
    shapes |= {} if name in PER_SEQUENCE else {True: tuple(labels.shape)}
    found = [by_token for by_token, shape in shapes.items() if tuple(value.shape) == shape]
    # what packed labels leave to a guess where there are as many tokens as sequences can be said by the shape
    if not found and labels.ndim == 1:
        said = {False: (count, 1), True: (1, labels.shape[0])}
        found = [by_token for by_token in shapes if tuple(value.shape) == said[by_token]]
        value = value.reshape(shapes[found[0]]) if found else value
    if not found:
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes.values()))
        meaning = " (the sum over its loss tokens, or per token)" if name in SUMMED else ""
        raise ValueError(f"{name} must have shape {wanted}{meaning}: got {tuple(value.shape)}")
    if len(found) == 2:
        # one and the same where each sequence is one token; both readings of a value that is spread are there then
        require_said(name, count, layout.lengths)
        found = [name in SUMMED]
    return value.detach(), found[0]


def _counted(layout: Layout) -> tuple[Tensor, Number, Number]:
    """Loss tokens of each sequence (B,), of the call and of its chosen half, of these at least 1."""
    half = layout.segments.shape[0] // 2
    lengths = layout.segments
    if layout.mask is not None:
        lengths = torch.zeros_like(lengths).index_add(0, layout.sequence_of, layout.mask.to(torch.int64))
    elif layout.lengths and not torch.compiler.is_compiling():
        return lengths, max(1, sum(layout.lengths)), max(1, sum(layout.lengths[:half]))
    # a tensor of whole numbers times a float would be of torch's default dtype
    return lengths, lengths.sum().clamp_min(1).double(), lengths[:half].sum().clamp_min(1).double()


def _normaliser(name: str, value: Number, device: torch.device) -> Number:
    """What a loss divides by; a tensor of 0 counts as 1, and one of a GPU that is no count makes the loss NaN."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number: got shape {tuple(value.shape)}")
        require_real(**{name: value})
        legal = not looks_at(value) or 0 <= value.item() < float("inf")
    else:
        require_number(name, value)
        legal = 0 < value < float("inf")
    if not legal:
        raise ValueError(f"{name} must be above 0: got {value}")
    if not isinstance(value, Tensor):
        return value
    found = _number(value, device)
    return torch.where(found == 0, 1.0, torch.where((found > 0) & found.isfinite(), found, torch.nan))


def _number(value: Number, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        if value.device == device or torch.compiler.is_compiling():
            return value.detach().reshape(()).double().to(device)
        if value.device.type != "cpu":
            raise ValueError(f"a normaliser must be on {device} or on the CPU: got {value.device}")
        value = value.item()
    # filled there: a copy from the host would wait for it
    return torch.full((), float(value), dtype=torch.float64, device=device)
