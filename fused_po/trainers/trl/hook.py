"""Where TRL's trainers take log-probs from, replaced and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.metadata import version
from typing import Any

from torch import Tensor

from fused_po.ops import linear_token_stats
from fused_po.stats import Stats
from fused_po.trainers.switch import Enabled, Switch
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


def _install(count: Callable[[], None], *, on_logits: bool = True, **options: Any) -> Callable[[], None]:
    found, utils = _installed()
    one_place = found >= FIRST and all(hasattr(utils, name) for name in (NAME, GATHER))
    patches = Patches(EXPERIMENTAL if one_place else tuple(METHODS), options, count)
    if on_logits:
        patches.install()
    original = getattr(utils, NAME, None)
    if one_place:
        setattr(utils, NAME, FusedLogProbs(count, getattr(utils, GATHER), **options))

    def remove() -> None:
        if one_place:
            setattr(utils, NAME, original)
        patches.remove()

    return remove


_SWITCH = Switch(_install)
disable, is_enabled, calls = _SWITCH.disable, _SWITCH.is_enabled, _SWITCH.calls


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
    _installed()
    return _SWITCH.enable(backend=backend, scratch_bytes=scratch_bytes)


@contextmanager
def enabled() -> Iterator[None]:
    """The one place within, whether or not it is enabled outside, whose options then count."""
    with nullcontext() if is_enabled() else _SWITCH.enable(on_logits=False):
        yield


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
