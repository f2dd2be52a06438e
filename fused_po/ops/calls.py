"""What the two operations on hidden states share: their common arguments, checked and laid out once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_po.distributed import Shard
from fused_po.ops.active import Arranged
from fused_po.ops.batches import Layout
from fused_po.ops.checks import (
    check_head,
    check_labels,
    check_main_grad,
    check_scalars,
    looks_at,
    require_number,
    require_tensors,
    row_temperatures,
)
from fused_po.ops.devices import stands_for
from fused_po.ops.gradients import Wanted
from fused_po.ops.head import Head, compute_dtype
from fused_po.ops.planning import Plan, blind, default_plan
from fused_po.ops.sizes import Sizes, default_scratch
from fused_po.ops.tokens import Tokens

__all__ = ["HeadCall", "prepare", "whole"]


def whole(*parameters: Tensor | None) -> AbstractContextManager[None]:
    """A context for a head that is whole already."""
    return nullcontext()


@dataclass(frozen=True)
class HeadCall:
    """Arguments that are not tensors, or never differentiated."""

    temperature: float
    softcap: float | None
    logit_scale: float
    compute_dtype: torch.dtype
    scratch_bytes: int
    backend: str | None
    wanted: Wanted
    plan: Plan
    # the call may look at values on a GPU once, before its loop
    may_wait: bool
    max_dropped_mass: float = 0.0
    shard: Shard | None = None
    # (V, H) in float32, where dW is added in backward
    main_grad: Tensor | None = None
    # a context in which a sharded head is whole, of its weight and bias
    gather: Callable[..., AbstractContextManager[Any]] = whole

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head as the sweep sees it."""
        return Head(
            weight,
            bias,
            self.compute_dtype,
            self.temperature,
            self.softcap,
            self.logit_scale,
            self.scratch_bytes // 8,
            self.backend,
            self.max_dropped_mass,
            self.shard,
        )

    def wanting(self, wanted: Wanted) -> HeadCall:
        return replace(self, wanted=wanted)

    def sizes(self, head: Head) -> Sizes:
        """What the route of the call follows from."""
        return Sizes.of(head, self.wanted, self.scratch_bytes, self.main_grad is not None)

    def tokens(
        self, head: Head, hidden: Tensor, labels: Tensor, temperatures: Tensor | None, arranged: Arranged
    ) -> Tokens:
        """The arranged rows, of labels and temperatures (N,) in planned order."""
        temperatures = None if temperatures is None else arranged.take(temperatures)
        return Tokens(head, hidden, arranged.take(labels), temperatures, arranged.rows, self.plan.masked)

    def covers(self, arranged: Arranged) -> bool:
        """The active rows are all positions."""
        return self.plan.rows is None and arranged.active == self.plan.count


@dataclass(frozen=True)
class Prepared:
    """Tensors of a call in the shapes that the sweep takes."""

    call: HeadCall
    layout: Layout
    hidden: Tensor  # (positions, H), or (B, S, H) where that would be a copy
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperatures: Tensor | None  # (N,)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    cu_seqlens: Tensor | None,
    scratch_bytes: int | None,
    plan: Plan | None,
    vocab_size: int | None,
    backend: str | None,
    process_group: Any = None,
    main_grad: Tensor | None = None,
) -> Prepared:
    """Check the arguments of an operation on hidden states and lay them out.

    Raises:
        ValueError: whatever does not fit, with what was got and what was wanted.
    """
    check_head(hidden, weight, bias, labels, vocab_size if process_group is None else None)
    check_scalars(temperature, softcap, logit_scale)
    given, shard = weight.shape, None
    if process_group is not None:
        # padded rows stay: tiles, and so the steps of the loop, must be the same on every rank
        shard = Shard.of(process_group, weight.shape[0], vocab_size)
        if looks_at(weight):
            shard.check(weight.shape[0], weight.device)
    elif vocab_size is not None and vocab_size < weight.shape[0]:
        weight = weight[:vocab_size]
        bias = None if bias is None else bias[:vocab_size]
    check_labels(labels, weight.shape[0] if shard is None else shard.classes)
    if cu_seqlens is not None:
        require_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens is not None and labels.ndim != 1:
        raise ValueError(f"cu_seqlens goes with packed labels (N,): got labels {tuple(labels.shape)}")
    if scratch_bytes is None:
        scratch_bytes = default_scratch(stands_for(hidden))
    require_number("scratch_bytes", scratch_bytes, whole=True)
    if scratch_bytes < 0:
        raise ValueError(f"scratch_bytes must not be negative: got {scratch_bytes}")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan must come from fused_po.make_plan: got {plan!r}")
    if backend is not None and not isinstance(backend, str):
        raise ValueError(f"backend must be a name or None: got {backend!r}")
    may_wait = plan is None and not blind(labels)
    if plan is None:
        plan = default_plan(labels, cu_seqlens)
        layout = Layout.of(labels, plan)
    else:
        layout = Layout.of(labels, plan, cu_seqlens)
    dtype = compute_dtype(hidden)
    wanted = Wanted(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spread = _sequence_of_positions(labels, cu_seqlens) if isinstance(temperature, Tensor) else None
    temperatures = row_temperatures(temperature, labels, spread, wide, plan.lengths or ())
    if main_grad is not None:
        check_main_grad(main_grad, weight, given, wide, wanted.weight)
        main_grad = main_grad[: weight.shape[0]]
    call = HeadCall(
        float(temperature) if temperatures is None else 1.0,
        None if softcap is None else float(softcap),
        float(logit_scale),
        dtype,
        scratch_bytes,
        backend,
        wanted,
        plan,
        may_wait,
        shard=shard,
        main_grad=main_grad,
    )
    if temperatures is not None:
        temperatures = layout.rows.gather(temperatures)
    return Prepared(call, layout, _flat(hidden), weight, bias, temperatures)


def _flat(hidden: Tensor) -> Tensor:
    """(B, S, H) as (B S, H) where that is a view; a slice such as ``hidden[:, :-1]`` stays, and is not copied."""
    if hidden.ndim == 2 or hidden.is_contiguous() or hidden.stride(0) == hidden.shape[1] * hidden.stride(1):
        return hidden.view(-1, hidden.shape[-1])
    return hidden


def _sequence_of_positions(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None or labels.ndim == 2:
        return None
    lengths = cu_seqlens.to(labels.device).diff()
    sequences = torch.arange(lengths.shape[0], device=labels.device)
    return sequences.repeat_interleave(lengths, output_size=labels.shape[0])
