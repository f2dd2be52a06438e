"""The one place where TRL's trainers take log-probs from, replaced and put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.metadata import version
from types import TracebackType
from typing import Any

from torch import Tensor

from fused_po.ops import linear_token_stats
from fused_po.stats import Stats

__all__ = ["Enabled", "FusedLogProbs", "calls", "disable", "enable", "is_enabled"]

NAME = "_ChunkedLogProbFunction"
FIRST = (1, 15)
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
        backend, scratch_bytes: as in ``linear_token_stats``.
        gather: of TRL, ``gather(weight, bias)`` is a context in which a sharded head is whole; entered again in
            backward.
    """

    def __init__(
        self,
        backend: str | None,
        scratch_bytes: int | None,
        gather: Callable[..., AbstractContextManager[Any]],
    ) -> None:
        self.options: dict[str, Any] = {"backend": backend, "scratch_bytes": scratch_bytes}
        self.gather = gather
        self.calls = 0
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
        self.calls += 1
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
    """What ``enable`` returns; as a context it calls ``disable`` at its end."""

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable()


def enable(*, backend: str | None = None, scratch_bytes: int | None = None) -> Enabled:
    """Let TRL's SFT, DPO, KTO, GRPO, RLOO and AsyncGRPO trainers take their log-probs from ``linear_token_stats``.

    Trainers that exist already change too; losses, metrics and gradients are TRL's, computed in float32 from float32
    logits where TRL rounds a tile of them to the dtype of the model. Calling it again changes the options.

    Args:
        backend: as in ``linear_token_stats``; None: the first that supports the case.
        scratch_bytes: as there, per call.

    Returns:
        a context manager that disables at its end, if used as one.

    Raises:
        ImportError: a TRL without this place; nothing is changed.
    """
    global _original
    utils = _utils()
    current = getattr(utils, NAME)
    if not isinstance(current, FusedLogProbs):
        _original = current
    setattr(utils, NAME, FusedLogProbs(backend, scratch_bytes, utils.maybe_gather_lm_head_ctx))
    return Enabled()


def disable() -> None:
    """Put TRL's own function back; nothing happens where ``enable`` was not called."""
    global _original
    if _original is not None:
        setattr(_utils(), NAME, _original)
        _original = None


def is_enabled() -> bool:
    """Whether TRL's trainers take their log-probs from here."""
    return _original is not None


def calls() -> int:
    """How many calls of TRL's trainers were answered since ``enable``; 0 where it is not enabled."""
    current = getattr(_utils(), NAME)
    return current.calls if isinstance(current, FusedLogProbs) else 0


_original: Any = None


def _utils() -> Any:
    found = version("trl")
    utils = import_module("trl.trainer.utils")
    missing = [name for name in (NAME, "maybe_gather_lm_head_ctx") if not hasattr(utils, name)]
    if tuple(int(part) for part in found.split(".")[:2]) < FIRST or missing:
        raise ImportError(f"TRL {found} is not supported: 1.15 or later is wanted; nothing was changed")
    return utils
