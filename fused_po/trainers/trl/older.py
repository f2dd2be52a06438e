"""Trainers that take log-probs from a model's logits: TRL 0.24 to 1.14, and CPO, ORPO and OnlineDPO of any version.

Their methods that call a model are wrapped (see ``logits``); TRL's functions on logits know what comes then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from fused_po.ops.checks import IGNORE
from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.logits import Methods
from fused_po.trainers.trl import chunked_nll
from fused_po.trainers.unmade import made

__all__ = ["EXPERIMENTAL", "METHODS", "Patches"]

# trainers and those of their methods that call a model, as far as a version has them
METHODS: Mapping[str, tuple[str, ...]] = {
    "DPOTrainer": ("_compute_loss", "compute_ref_log_probs", "concatenated_forward"),
    "KTOTrainer": (
        *("_compute_loss", "_compute_kl_logps", "compute_ref_log_probs"),
        *("get_batch_loss_metrics", "compute_reference_log_probs", "_compute_logps"),
    ),
    "GRPOTrainer": ("_get_per_token_logps_and_entropies",),
    "RLOOTrainer": ("_get_per_token_logps_and_entropies",),
    "SFTTrainer": ("compute_loss", "prediction_step"),
    "CPOTrainer": ("concatenated_forward",),
    "ORPOTrainer": ("concatenated_forward",),
    "OnlineDPOTrainer": ("_forward",),
}
# still on logits where the others have a fused head
EXPERIMENTAL = ("CPOTrainer", "ORPOTrainer", "OnlineDPOTrainer")


class Patches:
    """Everything that is replaced, to be put back by ``remove``.

    Args:
        trainers: names from ``METHODS``.
        options: of ``linear_token_stats``.
        count: called for each of its calls.
    """

    def __init__(self, trainers: tuple[str, ...], options: Mapping[str, Any], count: Callable[[], None]) -> None:
        self._trainers, self._methods = trainers, Methods(options, count)
        self._options, self._count = options, count
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Replace functions and methods.

        Raises:
            ImportError: a TRL without the functions; nothing is changed.
        """
        utils = import_module("trl.trainer.utils")
        if not hasattr(utils, "selective_log_softmax"):
            raise ImportError("this TRL has no trl.trainer.utils.selective_log_softmax; nothing was changed")
        for name, make in _FUNCTIONS.items():
            original = getattr(utils, name, None)
            if original is not None:
                self._everywhere(name, original, make(original))
        if "SFTTrainer" in self._trainers:
            original = getattr(import_module("trl.trainer.sft_trainer"), chunked_nll.NAME, None)
            if original is not None:
                gather = utils.maybe_gather_lm_head_ctx
                ours = chunked_nll.chunked_nll(original, gather, self._count, self._options)
                self._everywhere(chunked_nll.NAME, original, ours)
        for trainer in self._loaded():
            self._methods.wrap(trainer, METHODS[trainer.__name__])
        self._follow()

    def remove(self) -> None:
        """Put everything back, and what has been imported meanwhile."""
        self._methods.remove()
        for owner, name, original in reversed(self._replaced):
            if isinstance(owner, ModuleType):
                for module in _trl_modules():
                    if getattr(getattr(module, name, None), "__wrapped__", None) is original:
                        setattr(module, name, original)
            else:
                setattr(owner, name, original)
        self._replaced.clear()

    def _everywhere(self, name: str, original: Any, ours: Any) -> None:
        """In every module that has imported the name."""
        for module in _trl_modules():
            if getattr(module, name, None) is original:
                setattr(module, name, ours)
        self._replaced.append((import_module("trl.trainer.utils"), name, original))

    def _loaded(self) -> list[type]:
        found = {
            value
            for module in _trl_modules()
            for name, value in list(vars(module).items())
            if name in self._trainers and isinstance(value, type)
        }
        return sorted(found, key=lambda one: one.__module__)

    def _follow(self) -> None:
        """Trainers that are imported later are wrapped when the first one is made."""
        from transformers import Trainer

        original = Trainer.__init__

        @wraps(original)
        def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
            for one in type(trainer).__mro__:
                if one.__name__ in self._trainers and one.__module__.startswith("trl."):
                    self._methods.wrap(one, METHODS[one.__name__])
            original(trainer, *args, **kwargs)

        Trainer.__init__ = init  # type: ignore[assignment, method-assign]
        self._replaced.append((Trainer, "__init__", original))


def _trl_modules() -> list[ModuleType]:
    # some of them are lazy: only what they hold already is looked at
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "trl" and module]


def _selective_log_softmax(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def selective_log_softmax(
        logits: Any, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Any:
        if not _fits(logits, index):
            return original(made(logits), index, **_given(temperature, row_mask))
        return (logits / temperature).logp(_masked(index, row_mask))

    return selective_log_softmax


def _selective_log_softmax_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def selective_log_softmax_and_entropy(
        logits: Any,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Any:
        if not _fits(logits, index):
            options = _given(temperature, row_mask)
            return original(made(logits), index, entropy_requires_grad=entropy_requires_grad, **options)
        scaled = logits if temperature == 1.0 else logits / temperature
        found = scaled.statistics(_masked(index, row_mask))
        entropy = found["entropy"]
        return found["logp"], entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _entropy_from_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def entropy_from_logits(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return logits.entropy() if isinstance(logits, DeferredLogits) else original(logits, *args, **kwargs)

    return entropy_from_logits


_FUNCTIONS = {
    "selective_log_softmax": _selective_log_softmax,
    "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    "entropy_from_logits": _entropy_from_logits,
}


def _fits(logits: Any, index: Tensor) -> bool:
    return isinstance(logits, DeferredLogits) and logits.now is None and index.shape == logits.shape[:-1]


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE)


def _given(temperature: float, row_mask: Tensor | None) -> dict[str, Any]:
    """Older functions know neither."""
    found: dict[str, Any] = {} if temperature == 1.0 else {"temperature": temperature}
    return found if row_mask is None else found | {"row_mask": row_mask}
