"""Hidden states and head of a causal language model, taken from a run of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fused_po.stats import Stats
from fused_po.trainers.deferred import DeferredLogits, stats_of
from fused_po.trainers.head import Head
from fused_po.trainers.seam import calls_of, deferred, output_layer, standing_in

__all__ = ["Found", "hidden_and_head", "run_apart", "take_apart", "token_stats_of"]

# rows of logits that a model is checked by
ROWS = 16
# elements of a buffer that a forward may write into
COUNTED = 1 << 20
# inputs that it writes into
STATES = ("past_key_values", "cache_params", "state")
_UNKNOWN = "is known once it has run: call the backbone first"
_checked: WeakSet[nn.Module] = WeakSet()


def take_apart(model: nn.Module, /, *, check: bool = True, **inputs: Any) -> tuple[Tensor, Head, Any]:
    """Run a causal language model up to its logits, which are not made.

    ::

        hidden, head, outputs = take_apart(model, input_ids=input_ids, attention_mask=attention_mask)
        out = linear_loss(hidden[:, :-1], head.weight, labels, loss, **head.options)
        loss = out.loss + 0.01 * outputs.aux_loss  # of a mixture of experts that was asked for its router's logits

    Args:
        model: a causal LM from transformers, vision-language models too, inside whatever wraps it (PEFT, DDP, FSDP2,
            ``torch.compile``, accelerate): it is called as it is.
        check: whether the first batch of a model is also used to compare some of its own logits with those of
            ``hidden`` and ``head``, in two more forwards without a graph, unless
            the inputs hold a cache. False: it is not.
        inputs: what the model takes. ``use_cache`` is False unless given, where the model knows it.

    Returns:
        hidden: (B, T, H), hidden states as the head met them: fewer than the tokens with ``logits_to_keep``, more with
            an adapter that adds some.
        head: as the model used it.
        outputs: what the model returned; where it has logits, there are ``DeferredLogits``.

    Raises:
        ValueError: a model without an output layer; one whose logits are not a head's alone, and what it does to them;
            one that fails the check.
    """
    found = run_apart(model, _without_cache(model, inputs), check=check)
    if isinstance(found.logits, Tensor):
        raise ValueError(f"{found.why}: take log-probs from its logits, as token_stats_of does")
    return found.logits.hidden, found.logits.whole(), found.outputs


def hidden_and_head(model: nn.Module, *, check: bool = True) -> tuple[Callable[..., Tensor], Any]:
    """``take_apart`` for code that wants the head's weight before any forward.

    ::

        backbone, head = hidden_and_head(model)
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask)   # (B, S, H)
        out = linear_loss(hidden[:, :-1], head.weight, labels, loss, **head.options)

    Args:
        model, check: as in ``take_apart``.

    Returns:
        ``backbone``, which takes what the model takes and returns hidden states (B, S, H), and the head, whose weight
        and bias are the layer's own. The rest of it is known once ``backbone`` has run.

    Raises:
        ValueError: a model without an output layer; of ``backbone`` as ``take_apart``.
    """
    head = _Known(output_layer(model)[1])

    def backbone(**inputs: Any) -> Tensor:
        hidden, found, _ = take_apart(model, check=check, **inputs)
        # numbers alone: weights that were gathered for the run are not kept beyond it
        head.shown = {name: getattr(found, name) for name in ("softcap", "logit_scale", "vocab_size")}
        return hidden

    return backbone, head


class _Known:
    """A head by its layer, and by what a run has shown of it."""

    shown: Mapping[str, Any] | None = None

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self._layer, "bias", None)
        return bias

    @property
    def options(self) -> dict[str, Any]:
        return self._run().options

    def logits(self, hidden: Tensor) -> Tensor:
        return self._run().logits(hidden)

    def __getattr__(self, name: str) -> Any:
        if self.shown is None:
            raise AttributeError(f"{name} of a model's head {_UNKNOWN}")
        return getattr(self._run(), name)

    def _run(self) -> Head:
        if self.shown is None:
            raise ValueError(f"what a model does to its logits {_UNKNOWN}")
        return Head(self.weight, self.bias, **self.shown)


def token_stats_of(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    outputs: Sequence[str] = ("logp",),
    *,
    check: bool = True,
) -> Stats:
    """Statistics of labels under a causal language model, differentiable, without its logits.

    A model whose logits are not a head's alone makes them, with a warning.

    Args:
        model, check: as in ``take_apart``.
        inputs: what the model takes, (B, S).
        labels: (B, S - 1), already shifted, -100 ignored.
        outputs: names of statistics.

    Raises:
        ValueError: as ``take_apart``, or a model that has more or fewer positions than the inputs.
    """
    found = run_apart(model, _without_cache(model, inputs), check=check)
    logits = found.logits
    positions = logits.shape[1]
    if positions != labels.shape[1] + 1:
        raise ValueError(
            f"the model has {positions} positions, and {labels.shape[1]} labels want {labels.shape[1] + 1}: an adapter "
            "that adds tokens (prompt learning) adds positions before those of the inputs, see take_apart"
        )
    return stats_of(logits[:, :-1], labels, outputs)


@dataclass(frozen=True)
class Found:
    """What a run of a model has shown.

    Attributes:
        logits: deferred, or real where they had to be made.
        outputs: what the model returned.
        why: a sentence without a full stop on why they are real, or "".
    """

    logits: DeferredLogits | Tensor
    outputs: Any
    why: str = ""


def run_apart(
    model: nn.Module, inputs: Mapping[str, Any], *, forward: Callable[..., Any] | None = None, check: bool = True
) -> Found:
    """``take_apart`` where logits that had to be made are no error.

    Args:
        model: holds the output layer.
        inputs: of its call.
        forward: called instead of the model, from within a forward of the model; None: the model is called.
        check: as there. Within a seam, or with a state that a forward writes into, there is none yet.

    Raises:
        ValueError: as ``take_apart``, but for logits that are made.
    """
    owner, layer = output_layer(model)
    run = partial(forward or model, **inputs)
    stateful = any(inputs.get(name) is not None for name in STATES)
    check = check and not stateful and layer not in _checked and calls_of(layer) is None
    with deferred(model, within=forward is not None) as calls:
        if check and not calls.why and not torch.compiler.is_compiling():
            if _check(model, owner, layer, run):
                _checked.add(layer)
            calls.clear()
        before = len(calls)
        outputs = run()
    logits = _logits_of(outputs)
    if logits is None:
        raise ValueError(f"{type(owner).__name__} returned no logits, but a {type(outputs).__name__}")
    now = logits if isinstance(logits, Tensor) else logits.now
    if now is None:
        return Found(logits, outputs)
    kind, done = type(owner).__name__, sorted({name for call in calls[before:] for name in call.unknown})
    if calls.why:
        return Found(now, outputs, f"the logits of {kind} are made, {calls.why}")
    why = f"it does {', '.join(done)} to them" if done else f"{type(layer).__name__} multiplies by no weight of its own"
    return Found(now, outputs, f"the logits of {kind} are not its output layer's alone, {why}")


def _without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    known = inspect.signature(output_layer(model)[0].forward).parameters
    return {"use_cache": False, **inputs} if "use_cache" in known else inputs


def _logits_of(outputs: Any) -> Any:
    """What a model returned as logits, deferred or not; None: nothing."""
    named = getattr(outputs, "logits", None)
    if isinstance(named, (DeferredLogits, Tensor)):
        return named
    leaves = pytree.tree_leaves(outputs, is_leaf=lambda leaf: isinstance(leaf, DeferredLogits))
    return next((leaf for leaf in leaves if isinstance(leaf, DeferredLogits)), None)


def _check(model: nn.Module, owner: nn.Module, layer: nn.Module, run: Callable[[], Any]) -> bool:
    """Compare some of a model's own logits with deferred ones, within its seam.

    Returns:
        whether there is nothing left to compare.

    Raises:
        ValueError: they differ by more than rounding, measured by the largest of them.
    """

    def some(layer: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden, *others = *args, *kwargs.values()
        given, by_name = [hidden[..., :ROWS, :], *others], len(args)
        return own(*given[:by_name], **dict(zip(kwargs, given[by_name:], strict=True)))

    with _looking(model):
        logits = _logits_of(run())
    if not isinstance(logits, DeferredLogits) or logits.now is not None:
        return True
    with _looking(model), standing_in(layer, some):
        own = _logits_of(run())
        ours = logits[..., :ROWS, :].made()
    # a row that is not a number in both tells nothing
    rows = ours.isfinite().all(-1) | own.isfinite().all(-1)
    ours, own = ours[rows], own[rows]
    if not own.numel():
        return False
    size, apart = own.abs().max(), (ours - own).abs().max()
    # half precision: what is rounded on the way to a logit
    if not apart <= max(1e-3, 16 * torch.finfo(own.dtype).eps) * size:
        raise ValueError(
            f"{type(owner).__name__} is not a head on its last hidden states: of logits up to {size:.2g} some differ "
            f"by {apart:.1e}; check=False takes them all the same"
        )
    return True


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    """Without a graph, a loss or warnings, as Python runs it; random numbers and buffers are those from before."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    # quantised weights are buffers too; what a forward keeps count of is small
    before = [
        (buffer, buffer.clone()) for buffer in model.buffers() if buffer.numel() <= COUNTED and not buffer.is_meta
    ]
    with ExitStack() as stack:
        for one in (torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings(), _NoLoss()):
            stack.enter_context(one)
        stack.enter_context(torch.random.fork_rng(devices))
        warnings.simplefilter("ignore")
        yield
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


class _NoLoss(TorchFunctionMode):
    """The loss of a model is 0 within: its labels are as many as the tokens."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(()) if function is functional.cross_entropy else function(*args, **(kwargs or {}))
