"""``linear_token_stats``: statistics of tokens from hidden states and the head, differentiable, for any loss on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients
from fused_po.ops.calls import HeadCall, prepare, whole
from fused_po.ops.checks import check_outputs, refuse_older_traces, refuse_transforms
from fused_po.ops.devices import without_autocast
from fused_po.ops.gradients import Gradients, Wanted, storage_dtype
from fused_po.ops.head import Head
from fused_po.ops.planning import Plan, Rows
from fused_po.ops.routes import Route
from fused_po.ops.sweep import Sweep
from fused_po.ops.tokens import Tokens
from fused_po.ops.workspace import Workspace
from fused_po.stats import DIFFERENTIABLE, STATISTICS, Stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_token_stats"]


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    outputs: Sequence[str] = ("logp",),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    scratch_bytes: int | None = None,
    plan: Plan | None = None,
    process_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    main_grad: Tensor | None = None,
    gather: Callable[..., AbstractContextManager[Any]] | None = None,
) -> Stats:
    """Per-token statistics of ``z = softcap tanh(logit_scale (h W^T + b) / softcap) / T`` without ever holding all
    logits.

    ``logp``, ``entropy`` and ``lse`` are differentiable in hidden, weight and bias, as often as the graph is kept.
    There are no second derivatives.

    A GEMM is a product of N tokens, H and V. A trainable head costs 3, and one more for the share of the tokens whose
    gradient tile, the gradient of the log-prob at the logits, could not be kept from forward to backward; a frozen head
    costs 2. Gradients through ``entropy`` or ``lse`` cost no further GEMM in half precision, with a trained head and no
    softcap, in a backward after which the graph is gone. Otherwise the logits are made again.

    Args:
        hidden: (B, S, H) or packed (N, H), floating point, any strides: a slice such as ``hidden[:, :-1]`` is not
            copied.
        weight: (V, H), floating point; cast once a call where it is stored in another dtype than the compute dtype,
            which is that of autocast if that is on, else of hidden.
        labels: (B, S) or (N,) int64, already shifted: position t holds the token that t predicts; -100 is ignored.
        bias: (V,) or None.
        outputs: names from ``Stats``.
        temperature: T > 0, a number, (B,), or the shape of labels; with packed labels (B,) needs ``cu_seqlens``.
        softcap: caps logits (Gemma 2: 30.0); None does not.
        logit_scale: multiplies the raw logits (Cohere, Granite).
        cu_seqlens: (B + 1,) int, cumulative lengths of packed sequences, to which temperatures (B,) belong; without
            such temperatures it changes nothing.
        scratch_bytes: bound on the memory beyond inputs, outputs and gradients; default 1 GiB on a GPU, 96 MiB on a
            CPU. Two things come on top: the room of one gradient of the weight in float32, where the weight is trained
            and stored in a narrower dtype; and a copy of the weight in the compute dtype, where it is stored in a
            wider one. A bound below what one row needs is raised to that.
        plan: from ``make_plan``. None makes one, for which the host waits for the labels once (while tracing: one from
            shapes alone).
        process_group: the ranks over which the vocabulary is sharded, see ``linear_loss``.
        vocab_size: classes (of all ranks), where the weight has padded rows behind them; default V.
        backend: ``"cuda"``, ``"triton"``, ``"reference"``, or None for the first that supports the case.
        main_grad: (V, H) float32 (float64 for float64), contiguous: backward adds the gradient of the weight to it, and
            ``weight.grad`` stays None (Megatron's fused accumulation).
        gather: for a head whose weight is whole only inside a context (ZeRO-3): ``gather(weight, bias)`` makes that
            context. Call inside it; the backward enters it again.

    Returns:
        Statistics in the shape of labels, float32 (float64 for float64), 0 where ignored.

    Raises:
        ValueError: shapes, dtypes, devices, labels or numbers that do not fit.
    """
    refuse_older_traces("linear_token_stats")
    refuse_transforms("linear_token_stats")
    check_outputs(outputs)
    ready = prepare(
        hidden,
        weight,
        labels,
        bias,
        temperature,
        softcap,
        logit_scale,
        cu_seqlens,
        scratch_bytes,
        plan,
        vocab_size,
        backend,
        process_group,
        main_grad,
    )
    asked = tuple(name for name in STATISTICS if name in outputs)
    call = ready.call if gather is None else replace(ready.call, gather=gather)
    values = _LinearTokenStats.apply(
        ready.hidden, ready.weight, ready.bias, ready.layout.row_labels, ready.temperatures, call, asked
    )
    return Stats(**{name: ready.layout.fill(value) for name, value in zip(asked, values, strict=True)})


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        call: HeadCall,
        asked: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.asked = call, asked
        with without_autocast(hidden):
            head, home = call.head(weight, bias), None
            route = Route.of(call.sizes(head), labels.shape[0], fused=False, unscaled=False)
            if route.eager:
                home = hidden.new_empty((labels.shape[0], hidden.shape[-1]), dtype=storage_dtype(hidden.dtype))
            head = head.copied() if call.wanted.any else head
            sweep = _sweep(call, route, head, hidden, labels, temperatures, home)
            stats = sweep.forward(asked)
        values = tuple(getattr(stats, name) for name in asked)
        ctx.mark_non_differentiable(*(v for name, v in zip(asked, values, strict=True) if name not in DIFFERENTIABLE))
        # a gathered head is not held whole
        copy = head.weight if call.gather is whole and head.weight is not weight else None
        ctx.save_for_backward(hidden, weight, bias, labels, temperatures, sweep.kept, home, sweep.anchors, copy)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # autograd's own refusal looks at grad_outputs alone, and a sum's have no history
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_token_stats has no second derivatives (create_graph=True): take log-probs from full logits"
            )
        return _backward(ctx, *grad_outputs)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, temperatures, kept, home, anchors, copy = ctx.saved_tensors
    call: HeadCall = ctx.call.wanting(Wanted(*ctx.needs_input_grad[:3]))
    given = dict(zip(ctx.asked, grad_outputs, strict=True))
    triple = Coefficients(*(given.get(name) for name in DIFFERENTIABLE))
    plain = triple.entropy is None and triple.lse is None
    with torch.no_grad(), without_autocast(hidden), call.gather(weight, bias):
        head = call.head(weight, bias)
        # what was kept is what forward wanted
        route = Route.of(ctx.call.sizes(head), labels.shape[0], fused=False, unscaled=False)
        head = head.copied(copy)
        sweep = _sweep(call, route if plain else route.recomputing(), head, hidden, labels, temperatures, home)
        # other gradients overwrite what is kept: another backward would miss it
        sweep.kept_rows = kept.shape[0] if plain or not _runs_again() else 0
        sweep.kept, sweep.anchors = kept, anchors
        covered, once = call.plan.rows is None, sweep.writes_once
        gradients = Gradients(
            call.wanted, hidden, head, weight.dtype, accumulate=not once, covered=covered, into=call.main_grad
        )
        if any(c is not None for c in triple):
            sweep.backward(triple, gradients)
        like = (hidden, weight, bias)
        d_hidden, *others = gradients.in_dtypes(tuple(None if t is None else t.dtype for t in like))
    # dH is flat; a sharded weight has lost its shape again by now
    d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
    return (d_hidden, *others, *[None] * 4)


def _runs_again() -> bool:
    """Whether the graph stays for another backward; a trace does not know."""
    if torch.compiler.is_compiling():
        return True
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


def _sweep(
    call: HeadCall,
    route: Route,
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    home: Tensor | None,
) -> Sweep:
    rows = Rows(((0, labels.shape[0]),), call.plan.rows)
    tokens = Tokens(head, hidden, labels, temperatures, rows, call.plan.masked)
    return Sweep(tokens, route, call.wanted, Workspace(hidden), home=home)
