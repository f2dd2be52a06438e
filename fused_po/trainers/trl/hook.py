"""Where TRL's trainers take log-probs from, replaced and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.metadata import version
from types import TracebackType
from typing import Any

from torch import Tensor

from fused_po.ops import linear_token_stats
from fused_po.stats import Stats
from fused_po.trainers.trl.older import EXPERIMENTAL, METHODS, Patches

__all__ = ["Enabled", "FusedLogProbs", "calls", "disable", "enable", "enabled", "is_enabled"]

NAME = "_ChunkedLogProbFunction"
GATHER = "maybe_gather_lm_head_ctx"
# the first version with one place for all trainers, and the oldest that is supported
FIRST, OLDEST = (1, 15), (0, 24)
# TRL's names of statistics, in the order of its outputs
NAMES = {
    "log_probs": "logp",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}

Columns = tuple[Tensor | None, ...]


class FusedLogProbs:
    """Stands where TRL has an ``autograd.Function``: only ``apply`` is called.

    Args:
        count: called for each call.
        gather: of TRL, ``gather(weight, bias)`` is a context in which a sharded head is whole; entered again in
            backward.
        options: ``backend`` and ``scratch_bytes`` of ``linear_token_stats``.
    """

    def __init__(
        self, count: Callable[[], None], gather: Callable[..., AbstractContextManager[Any]], **options: Any
    ) -> None:
        self.options = options
        self.gather, self.count = gather, count
        # a call that makes the gradient of a loss in the same pass, see one_pass
        self.pending: Callable[..., Stats] | None = None

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> Columns:
        """TRL's arguments and outputs: log-probs (N,), then entropy, log sum p^2, mean logit, is top 1 or None each.

        Args:
            hidden: (N, H).
            weight: (V, H).
            bias: (V,) or None.
            targets: (N,) int64.
            temperature, final_logit_softcapping, logit_scale: of the logits.
            chunk_size: TRL's tile; ours follows from ``scratch_bytes``.
            outputs: TRL's names of what is wanted beside the log-probs.
        """
        self.count()
        asked = tuple(ours for name, ours in NAMES.items() if name == "log_probs" or name in outputs)
        head: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
            **self.options,
        }
        if self.pending is not None:
            found = self.pending(hidden, weight, targets, asked, **head)
        else:
            found = linear_token_stats(hidden, weight, targets, outputs=asked, gather=self.gather, **head)
        return tuple(getattr(found, name) for name in NAMES.values())


class Enabled:
    """What ``enable`` returns; as a context it restores at its end what it found."""

    def __init__(self, before: dict[str, Any] | None) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            disable()
        else:
            enable(**self._before)


class _State:
    """What is replaced.

    Attributes:
        options: of ``enable``.
        calls: how many were answered.
        original: TRL's function, where this version has the one place.
        patches: of trainers on logits.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.calls = options, 0
        self.original: Any = None
        self.patches: Patches | None = None

    def count(self) -> None:
        self.calls += 1

    def install(self, on_logits: bool = True) -> None:
        found, utils = _installed()
        one_place = found >= FIRST and all(hasattr(utils, name) for name in (NAME, GATHER))
        trainers = EXPERIMENTAL if one_place else tuple(METHODS)
        if on_logits:
            self.patches = Patches(trainers, self.options, self.count)
            self.patches.install()
        if one_place:
            self.original = getattr(utils, NAME)
            setattr(utils, NAME, FusedLogProbs(self.count, getattr(utils, GATHER), **self.options))

    def remove(self) -> None:
        if self.original is not None:
            setattr(_installed()[1], NAME, self.original)
        if self.patches is not None:
            self.patches.remove()


def enable(*, backend: str | None = None, scratch_bytes: int | None = None) -> Enabled:
    """Let TRL's trainers take their log-probs from ``linear_token_stats``.

    From TRL 1.15 on: SFT, DPO, KTO, GRPO, RLOO and AsyncGRPO, through the one place where they take them, and the
    experimental CPO, ORPO and OnlineDPO. From 0.24 to 1.14: all of these that the version has, through the logits that
    they ask a model for, which are not made (see ``deferred``). Trainers that exist already change too; losses, metrics
    and gradients are those of the installed TRL, computed in float32 from float32 logits. Calling it again changes the
    options.

    Args:
        backend: as in ``linear_token_stats``; None: the first that supports the case.
        scratch_bytes: as there, per call.

    Returns:
        a context manager that at its end puts back what was there before the call, if used as one.

    Raises:
        ImportError: a TRL before 0.24, or one without the functions; nothing is changed.
    """
    global _state
    before = None if _state is None else _state.options
    _installed()
    disable()
    made = _State({"backend": backend, "scratch_bytes": scratch_bytes})
    made.install()
    _state = made
    return Enabled(before)


@contextmanager
def enabled() -> Iterator[None]:
    """The one place within, whether or not it is enabled outside, whose options then count."""
    global _state
    if _state is not None:
        yield
        return
    _state = _State({"backend": None, "scratch_bytes": None})
    _state.install(on_logits=False)
    try:
        yield
    finally:
        disable()


def disable() -> None:
    """Put TRL's own functions back; nothing happens where ``enable`` was not called."""
    global _state
    if _state is not None:
        _state.remove()
        _state = None


def is_enabled() -> bool:
    """Whether TRL's trainers take their log-probs from here."""
    return _state is not None


def calls() -> int:
    """How many calls of TRL's trainers were answered since ``enable``; 0 where it is not enabled."""
    return 0 if _state is None else _state.calls


_state: _State | None = None


def _installed() -> tuple[tuple[int, ...], Any]:
    """The version of TRL, and the module that its trainers take their functions from.

    Raises:
        ImportError: a version that is not supported.
    """
    found = version("trl")
    numbers = tuple(int(part) for part in found.split(".")[:2])
    utils = import_module("trl.trainer.utils")
    if numbers < OLDEST or not hasattr(utils, "selective_log_softmax"):
        raise ImportError(f"TRL {found} is not supported: 0.24 or later is wanted; nothing was changed")
    return numbers, utils
