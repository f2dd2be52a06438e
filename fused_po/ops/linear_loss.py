"""``linear_loss``: hidden states, head and loss in one pass; the gradient is made in the forward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_po.kernels.blocks import leaves_out
from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import Batch, Loss, require_sides
from fused_po.ops.batches import Number, call_batch, masked_stats
from fused_po.ops.calls import HeadCall, prepare
from fused_po.ops.checks import check_outputs, refuse_older_traces, refuse_transforms, require_number
from fused_po.ops.devices import without_autocast
from fused_po.ops.gradients import Gradients, add_scaled, scaled
from fused_po.ops.loss_pass import LossPass
from fused_po.ops.output import LossOutput, SplitGradients, part_names
from fused_po.ops.planning import Plan
from fused_po.ops.sweep import Sweep
from fused_po.ops.workspace import Workspace
from fused_po.splits import Split, check_split
from fused_po.stats import STATISTICS, Stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_loss"]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    num_items: Number | None = None,
    num_sequences: Number | None = None,
    num_chosen_items: Number | None = None,
    split: Split | None = None,
    split_gradients: bool | str = False,
    max_dropped_mass: float = 0.0,
    outputs: Sequence[str] = (),
    scratch_bytes: int | None = None,
    plan: Plan | None = None,
    process_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    main_grad: Tensor | None = None,
    gather: Callable[..., AbstractContextManager[Any]] | None = None,
    **side_inputs: Number,
) -> LossOutput:
    """The loss of a batch and, in the same pass, its gradients: 3 GEMMs with a trainable head, 2 with a frozen one.

    A GEMM is a product of N tokens, H and V: GEMM 1 makes logits, GEMM 2 the gradient of the hidden states, GEMM 3 that
    of the weight, dW. Gradients are made in the forward and multiplied in the backward by what arrives there. So there
    is one backward, and another raises.

    A long call is cut into chunks. Each holds whole horizons: what the loss must see at once (a token, a sequence, a
    pair, ...). A horizon that is larger than a chunk costs 3 GEMMs too where the loss has a ``pattern`` and the call
    holds nothing else; otherwise up to 4, since some logits are made twice. A short call (N <= H where all dtypes are
    alike) keeps the gradients of its logits and runs GEMM 2 and 3 in the backward, so two calls before one backward
    hold them twice. ``Plan.explain`` says what a call does.

    Args:
        hidden: (B, S, H), or packed (N, H) with ``cu_seqlens``; floating point, any strides: a slice such as
            ``hidden[:, :-1]`` is not copied. Pairs: first half of the sequences chosen, second half rejected.
        weight: (V, H), floating point; cast once a call where it is stored in another dtype than the compute dtype,
            which is that of autocast if that is on, else of hidden.
        labels: (B, S) or (N,) int64, already shifted: position t holds the token that t predicts; -100 is ignored.
        loss: from ``fused_po.losses.create``.
        bias: (V,) or None.
        temperature: T > 0, a number, (B,), or the shape of labels.
        softcap: caps logits (Gemma 2: 30.0); None does not. Under ``torch.compile`` this and ``logit_scale`` are
            constants: each value is compiled for.
        logit_scale: multiplies the raw logits (Cohere, Granite).
        cu_seqlens: (B + 1,) int, cumulative lengths of packed sequences; packed without it is one sequence.
        num_items: number of loss tokens to normalise by (all ranks, gradient accumulation); default counted from this
            call. A tensor of 0, as where no rank has a loss token, divides by 1; the number 0 is an error.
        num_sequences: number of sequences to normalise by, twice that of pairs; default counted from this call.
        num_chosen_items: number of loss tokens of the chosen answers to normalise by, for the NLL of ``cpo``, ``orpo``
            and paired ``sft``; default counted from this call. With the normalisers given, the gradients of
            micro-batches that keep pairs together add up to that of the whole batch, for every loss whose
            ``not_additive`` is None.
        split: scales positive and negative learning, and the loss's own weights (``fused_po.Split``); the reported
            loss is not changed by it, its gradient is.
        split_gradients: True also returns the gradients of the parts of the loss, as ``.split_gradients``: that of the
            tokens on the positive side, of those on the negative one, and of the rest. ``"thirds"`` returns those of
            the top, middle and bottom third of the tokens by the loss's own weight, which makes the batch the horizon.
            Parts share the tokens out among them and take no further GEMM. They cost a dW each and a copy of the
            gradient of the hidden states, outside ``scratch_bytes``, and the host waits once for each tile.
        max_dropped_mass: in [0, 1); 0.0, the default, is exact. Above, GEMM 2 and 3 leave out blocks of the vocabulary
            in which a token's gradient is negligible. No token loses more than this share of the sum over classes of
            its gradient's absolute values. Value, statistics and the gradient of the bias stay exact. It pays where
            labels are likely: 1e-3 leaves out most blocks of such tokens, and none where the probability is spread out.
            On a GPU nothing is left out unless a backend is named, and a warning says so.
        outputs: names of statistics that ``.stats`` holds beside those that the loss reads.
        scratch_bytes: bound on the memory beyond inputs, outputs and gradients; default 1 GiB on a GPU, 96 MiB on a
            CPU. Two things come on top: the room of one gradient of the weight in float32, where the weight is trained
            and stored in a narrower dtype; and a copy of the weight in the compute dtype, where it is stored in a
            wider one. A bound below what one row needs is raised to that.
        plan: from ``make_plan``. None makes one, for which the host waits once, to look at labels and advantages (while
            tracing: one from shapes alone). With a plan, a call on a GPU does not look for tokens without a gradient.
        process_group: the ranks over which the vocabulary is sharded, in its order. Weight and bias are this rank's
            rows, as many on every rank; all else is the same on every rank. On every rank the gradient of the weight is
            that of the shard, and the gradient of the hidden states that of the whole head.
        vocab_size: classes (of all ranks), where the weight has padded rows behind them; default V.
        backend: ``"cuda"``, ``"triton"``, ``"reference"``, or None for the first that supports the case.
        main_grad: (V, H) float32 (float64 for float64), contiguous: backward adds the gradient of the weight to it, and
            ``weight.grad`` stays None (Megatron's fused accumulation).
        gather: for a head whose weight is whole only inside a context (ZeRO-3): ``gather(weight, bias)`` makes that
            context. Call inside it; a backward that needs the head enters it again.
        side_inputs: what the loss reads besides, by name; used detached. ``ref_logp``, ``old_logp`` and
            ``sampling_logp``: (B,), the sum over a sequence's loss tokens, or per token in the shape of labels, which
            policy losses want. ``advantage``, ``importance_weight``, ``row_weight``: (B,) or per token. ``desirable``:
            (B,) bool. ``nll_mask``: bool in the shape of labels. ``kl``, ``shift``: scalars.

    Returns:
        LossOutput.

    Raises:
        ValueError: shapes, dtypes, devices, labels, numbers or side inputs that do not fit the call or the loss.
    """
    refuse_older_traces("linear_loss")
    refuse_transforms("linear_loss")
    if not isinstance(loss, Loss):
        raise ValueError(f"loss must come from fused_po.losses.create(name): got {loss!r}")
    loss.check(frozenset(side_inputs), _ARGUMENTS)
    check_split(split, loss)
    if outputs != ():
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
    require_number("max_dropped_mass", max_dropped_mass)
    if not 0.0 <= max_dropped_mass < 1.0:
        raise ValueError(f"max_dropped_mass must lie in [0, 1), a share of each row's gradient: got {max_dropped_mass}")
    if max_dropped_mass and split_gradients:
        raise ValueError("max_dropped_mass does not go with split_gradients: its parts would not sum to the whole")
    dropped = float(max_dropped_mass) if max_dropped_mass and leaves_out(hidden.device, backend) else 0.0
    call, layout = replace(ready.call, max_dropped_mass=dropped), ready.layout
    call = call if gather is None else replace(call, gather=gather)
    if call.wanted.any:
        _warn_inside_checkpoint()
    batch = call_batch(layout, side_inputs, num_items, num_sequences, torch.float64, num_chosen_items)
    names = part_names(split_gradients)
    if names:
        require_sides(loss, "split_gradients")
    kept: dict[str, Tensor] = {}
    tensors = (ready.hidden, ready.weight, ready.bias, layout.row_labels, ready.temperatures)
    asked = tuple(name for name in STATISTICS if name in loss.statistics or name in outputs)
    value, *packed = _LinearLoss.apply(*tensors, call, loss, split, names, kept, batch, asked)
    stats = Stats(**dict(zip(asked, packed, strict=True)))
    with torch.no_grad():
        metrics = loss.metrics(masked_stats(stats, layout.mask), batch)
        shaped = Stats(**{name: layout.fill(v) for name, v in stats.present().items()})
    parts = SplitGradients.of(names, kept, layout, hidden.shape, weight.shape[0]) if names else None
    return LossOutput(value, metrics, shaped, parts)


_ARGUMENTS = frozenset(inspect.signature(linear_loss).parameters)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        call: HeadCall,
        loss: Loss,
        split: Split | None,
        names: tuple[str, ...],
        kept: dict[str, Tensor],
        batch: Batch,
        asked: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.dtypes, ctx.shape = tuple(None if t is None else t.dtype for t in (hidden, weight, bias)), hidden.shape
        with without_autocast(hidden):
            run = LossPass(call, call.head(weight, bias), loss, split, names, asked, hidden, labels, temperatures)
            value, factor, stats = run(batch)
            ctx.call, ctx.route, ctx.arranged = call, run.route, None
            if run.pending is None:
                gradients = run.gradients.finish()
                if names:
                    run.keep_parts(kept)
                ctx.save_for_backward(factor, run.gradients.scale, *gradients)
            else:
                sweep, ctx.arranged, c = run.pending
                ctx.save_for_backward(hidden, weight, bias, labels, temperatures, sweep.kept, sweep.anchors, c)
        packed = tuple(stats[name] for name in asked)
        ctx.mark_non_differentiable(*packed)
        return value.to(run.head.accumulation_dtype), *packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        _only_once(ctx)
        found: tuple[Tensor | None, ...]
        if ctx.arranged is None:
            factor, scale, *gradients = ctx.saved_tensors
            of_hidden = grad_output * factor
            of_head = of_hidden if scale is None else of_hidden * scale
            factors = (of_hidden, of_head, of_head)
            if ctx.call.main_grad is not None and gradients[1] is not None:
                add_scaled(ctx.call.main_grad, gradients[1], of_head)
                gradients[1] = None
            found = tuple(scaled(g, f, dtype) for g, f, dtype in zip(gradients, factors, ctx.dtypes, strict=True))
        else:
            hidden, weight, bias, labels, temperatures, kept, anchors, c = ctx.saved_tensors
            call: HeadCall = ctx.call
            with without_autocast(hidden), call.gather(weight, bias):
                head = call.head(weight, bias).copied()
                tokens = call.tokens(head, hidden, labels, temperatures, ctx.arranged)
                sweep = Sweep(tokens, ctx.route, call.wanted, Workspace(hidden), active=ctx.arranged.active)
                sweep.kept, sweep.anchors = kept, anchors
                covered = call.covers(ctx.arranged)
                gradients = Gradients(
                    call.wanted, hidden, head, weight.dtype, accumulate=False, covered=covered, into=call.main_grad
                )
                sweep.backward(Coefficients(c * grad_output), gradients)
                found = gradients.in_dtypes(ctx.dtypes)
        d_hidden = None if found[0] is None else found[0].view(ctx.shape)
        return (d_hidden, *found[1:], *[None] * 9)


def _only_once(ctx: Any) -> None:
    """Gradients are scaled where they are, so another backward would scale them again."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            "linear_loss makes its gradient once, so it has one backward: call it again, or take linear_token_stats, "
            "whose graph can be kept"
        )
    ctx.spent = True


def _warn_inside_checkpoint() -> None:
    """Activation checkpointing runs the forward, and so the whole pass, a second time."""
    if torch.compiler.is_compiling():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        warnings.warn(
            "linear_loss makes its gradient in the forward: inside activation checkpointing it runs twice", stacklevel=3
        )
