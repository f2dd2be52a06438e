"""Hidden states and head of a causal language model, taken from a run of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_po.ops import linear_token_stats, token_stats
from fused_po.stats import Stats
from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.head import Head
from fused_po.trainers.seam import deferred, output_layer, standing_in

__all__ = ["Found", "hidden_and_head", "run_apart", "take_apart", "token_stats_of"]

# rows of logits that a model is checked by
ROWS = 16
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
            ``hidden`` and ``head``, in two more forwards without a graph. False: it is not.
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
    found = run_apart(model, _running(model, inputs), check=check)
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
        hidden, head.found, _ = take_apart(model, check=check, **inputs)
        return hidden

    return backbone, head


class _Known:
    """A head by its layer, and by what a run has shown of it."""

    found: Head | None = None

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
        return self._run.options | {"bias": self.bias}

    def logits(self, hidden: Tensor) -> Tensor:
        return self._run.logits(hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    @property
    def _run(self) -> Head:
        if self.found is None:
            raise ValueError("what a model does to its logits is known once it has run: call the backbone first")
        return self.found


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
    found = run_apart(model, _running(model, inputs), check=check)
    logits = found.logits
    positions = logits.shape[1]
    if positions != labels.shape[1] + 1:
        raise ValueError(
            f"the model has {positions} positions, and {labels.shape[1]} labels want {labels.shape[1] + 1}: an adapter "
            "that adds tokens (prompt learning) adds positions before those of the inputs, see take_apart"
        )
    if isinstance(logits, Tensor):
        return token_stats(logits[:, :-1], labels, outputs=tuple(outputs))
    head = logits.whole()
    return linear_token_stats(logits.hidden[:, :-1], head.weight, labels, outputs=tuple(outputs), **head.options)


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


def run_apart(model: nn.Module, run: Callable[[], Any], *, check: bool = True) -> Found:
    """``take_apart`` for a call of one's own; logits that had to be made are no error.

    Args:
        model: holds the output layer.
        run: calls the model, once for each call of this and twice more for a check.
        check: as there.

    Raises:
        ValueError: as ``take_apart``, but for logits that are made.
    """
    owner, layer = output_layer(model)
    if check and layer not in _checked and not torch.compiler.is_compiling():
        _check(model, owner, layer, run)
        _checked.add(layer)
    with deferred(model) as calls:
        outputs = run()
    logits = _logits_of(outputs)
    if logits is None:
        raise ValueError(f"{type(owner).__name__} returned no logits, but a {type(outputs).__name__}")
    real = logits if isinstance(logits, Tensor) else logits.now
    if real is None:
        return Found(logits, outputs)
    done = sorted({name for call in calls for name in call.unknown})
    why = f"it does {', '.join(done)} to them" if done else f"{type(layer).__name__} multiplies by no weight of its own"
    why = f"the logits of {type(owner).__name__} are not its output layer's alone, {why}"
    if not done:
        warnings.warn(f"{why}: all of them are made", stacklevel=3)
    return Found(real, outputs, why)


def _running(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of the model, without a cache."""
    known = inspect.signature(output_layer(model)[0].forward).parameters
    given = {"use_cache": False, **inputs} if "use_cache" in known else inputs
    return lambda: model(**given)


def _logits_of(outputs: Any) -> Any:
    """What a model returned as logits, deferred or not; None: nothing."""
    named = getattr(outputs, "logits", None)
    if isinstance(named, (DeferredLogits, Tensor)):
        return named
    leaves = pytree.tree_leaves(outputs, is_leaf=lambda leaf: isinstance(leaf, DeferredLogits))
    return next((leaf for leaf in leaves if isinstance(leaf, DeferredLogits)), None)


def _check(model: nn.Module, owner: nn.Module, layer: nn.Module, run: Callable[[], Any]) -> None:
    """Compare some of a model's own logits with deferred ones.

    Raises:
        ValueError: they differ by more than rounding, measured by the largest of them.
    """

    def some(layer: nn.Module, own: Callable[..., Any], hidden: Tensor, *others: Any) -> Any:
        return own(hidden[..., :ROWS, :], *others)

    with _looking(model), deferred(model):
        logits = _logits_of(run())
        if not isinstance(logits, DeferredLogits) or logits.now is not None:
            return
        ours = logits[..., :ROWS, :].made()
    with _looking(model), standing_in(layer, some):
        own = _logits_of(run())
    size = own.abs().max()
    apart = (ours - own).abs().max() / size
    # half precision: what is rounded on the way to a logit
    if not apart <= max(1e-3, 16 * torch.finfo(own.dtype).eps):
        raise ValueError(
            f"{type(owner).__name__} is not a head on its last hidden states: of logits up to {size:.2g} some differ "
            f"by {apart:.1e} of that; check=False takes them all the same"
        )


@contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    """Without a graph, as Python runs it, and with the random numbers that come next."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
