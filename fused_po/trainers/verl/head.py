"""Log-probs and entropies under the names and signatures of verl (0.9), on ``linear_token_stats``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from fused_po.ops import linear_token_stats
from fused_po.trainers.deferred import stats_of
from fused_po.trainers.model import run_apart

__all__ = ["FusedLinearForPPO", "PPOOutput", "forward_with_fused_po", "linear_cross_entropy", "note_forward"]

OUTPUTS = ("logp", "entropy")
REDUCTIONS = ("none", "sum", "mean")
_originals: WeakKeyDictionary[type, Callable[..., Any]] = WeakKeyDictionary()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
    *,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``: log-probs and entropies of packed tokens.

    Both are differentiable, and an entropy without a gradient costs none. There is no condition on H or V.

    Args:
        hidden: (N, H) or (..., H), flattened.
        weight: (V, H), or this rank's rows of it, of which every rank of the group has as many.
        labels: N of them in any shape, any integer dtype, already shifted; -100 is ignored.
        temperature: of the logits, a number; also (N,) or in the shape of labels.
        reduction: of the log-probs: ``none``, ``sum`` or ``mean``; entropies stay per token, as in verl.
        dist_process_group: the tensor-parallel group over which the vocabulary is sharded, all else being the same on
            its ranks; None or a group of one: the weight is whole. As in verl the gradients of ``hidden`` on the ranks
            sum up to the whole, which Megatron's gather of a sequence-parallel region does in its backward.
        backend, scratch_bytes: as in ``linear_token_stats``.

    Returns:
        log-probs (N,), or () if reduced, and entropies (N,); float32 (float64 for float64), 0 where ignored.

    Raises:
        ValueError: an unknown reduction, numbers of tokens that differ, or what ``linear_token_stats`` refuses.
    """
    if reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}")
    options: dict[str, Any] = {"backend": backend, "scratch_bytes": scratch_bytes}
    ranks = 1 if dist_process_group is None else dist_process_group.size()
    if ranks > 1:
        hidden = _Shared.apply(hidden, ranks)
        options["process_group"] = dist_process_group
    flat = labels.reshape(-1)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1) if temperature.numel() > 1 else temperature.reshape(1).expand(flat.shape)
    logp, entropy = _stats(hidden.reshape(-1, hidden.shape[-1]), weight, flat, temperature, **options)
    if reduction.lower() == "none":
        return logp, entropy
    # means over all tokens, those that are ignored too, as verl divides
    return logp.sum() if reduction.lower() == "sum" else logp.mean(), entropy


class FusedLinearForPPO(nn.Module):
    """``verl.utils.experimental.torch_functional.FusedLinearForPPO``.

    The entropy is float32, where verl rounds it to the dtype of the hidden states.

    Args:
        chunk_size, impl_backend: of verl's own way through the tokens; they change nothing here.
        backend, scratch_bytes: as in ``linear_token_stats``.
    """

    def __init__(
        self,
        chunk_size: int = 512,
        impl_backend: str = "torch",
        *,
        backend: str | None = None,
        scratch_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend
        self.options: dict[str, Any] = {"backend": backend, "scratch_bytes": scratch_bytes}

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies in the shape of ``input_ids``, float32 (float64 for float64), differentiable.

        Args:
            hidden_states: (B, S, H) or (N, H).
            vocab_weights: (V, H).
            input_ids: (B, S) or (N,), any integer dtype: the labels, already shifted; -100 is ignored.
            temperature: of the logits; a number, or a tensor as in ``linear_token_stats``.
        """
        return _stats(hidden_states, vocab_weights, input_ids, temperature, **self.options)


@dataclass
class PPOOutput(CausalLMOutputWithPast):
    """What verl's actors read of a fused forward; the fields of transformers' output beside them, without logits.

    Attributes:
        log_probs: (B, S), of the labels.
        entropy: (B, S), of the distributions.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None


def forward_with_fused_po(
    self: nn.Module,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    temperature: float | Tensor = 1.0,
    shift_labels: Tensor | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> PPOOutput:
    """A ``forward`` for causal language models with the contract of verl's ``forward_with_torch_backend``.

    ::

        note_forward(type(model))  # before verl's apply_monkey_patch
        type(model).forward = forward_with_fused_po  # after it

    Unlike verl's it runs the model's own forward, and so heeds all that the model does to its logits, and passes what
    else it gets, images for one, to the model.

    Args:
        input_ids: (B, S).
        labels: (B, S), not shifted; None: ``input_ids``. Rolled by one, so that the last position, whose label is the
            first, is for the caller to leave out.
        shift_labels: (B, S), already shifted: taken as they are. -100 is ignored.
        temperature: of the logits; a number, (B,) or (B, S).
        return_dict: None or True.
        logits_to_keep: not read, as in verl.
        kernel_options: ``backend`` and ``scratch_bytes`` of ``linear_token_stats``.
        inputs: and the other arguments: the model's.

    Returns:
        PPOOutput.

    Raises:
        ValueError: nothing to take labels from, ``return_dict=False``, or what ``linear_token_stats`` refuses.
    """
    if return_dict is False:
        raise ValueError("the fused forward returns an output object: return_dict=False is not supported")
    source = labels if labels is not None else input_ids
    if shift_labels is None and source is None:
        raise ValueError("one of shift_labels, labels and input_ids is needed for the log-probs")
    # what is None may be unknown to the model
    given = {name: value for name, value in {"input_ids": input_ids, **inputs}.items() if value is not None}
    taken = run_apart(self, given | {"return_dict": True}, forward=partial(original_forward(type(self)), self))
    if shift_labels is None:
        assert source is not None
        shift_labels = source.roll(-1, -1)
    found = stats_of(
        taken.logits, shift_labels.to(torch.int64), OUTPUTS, temperature=temperature, **(kernel_options or {})
    )
    logp, entropy = found.logp, found.entropy
    assert logp is not None and entropy is not None
    return PPOOutput(
        past_key_values=taken.outputs.get("past_key_values"),
        hidden_states=taken.outputs.get("hidden_states"),
        attentions=taken.outputs.get("attentions"),
        # an operation in place on a view would drop the hook that FSDP2 puts on an output
        log_probs=logp.clone(),
        entropy=entropy.clone(),
    )


def note_forward(kind: type) -> None:
    """Remember the forward that a model's class has, before it gets another."""
    _originals.setdefault(kind, kind.forward)  # type: ignore[attr-defined]


def original_forward(kind: type) -> Callable[..., Any]:
    """The model's own forward, where ours stands in its class.

    Raises:
        ValueError: it was lost when ours was put there.
    """
    for one in kind.__mro__:
        forward = _originals.get(one, vars(one).get("forward"))
        if forward is not None and inspect.unwrap(forward) is not forward_with_fused_po and one is not nn.Module:
            return forward
    raise ValueError(f"the forward of {kind.__name__} is lost: note_forward() its class before another is put there")


class _Shared(torch.autograd.Function):
    """The same hidden states on every rank, whose gradients the caller sums up: each gets its share of the whole."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def _stats(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    found = linear_token_stats(
        hidden, weight, labels.to(torch.int64), outputs=OUTPUTS, temperature=temperature, **options
    )
    assert found.logp is not None and found.entropy is not None
    return found.logp, found.entropy
