"""The statistics of a token that losses read and operations return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["DIFFERENTIABLE", "STATISTICS", "Stats", "described"]

# the order in which operations return them
STATISTICS = ("logp", "entropy", "lse", "mean_logit", "is_top1", "log_sum_sq_probs", "max_logp")

# gradients flow through these; the others are for metrics and detached weights
DIFFERENTIABLE = ("logp", "entropy", "lse")


def described(tensor: Tensor) -> str:
    """A tensor in a few words: what it is, and not what it holds."""
    shape = str(tuple(tensor.shape))
    where = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}{where}"


@dataclass(frozen=True, repr=False)
class Stats:
    """Numbers of each token, from its logits ``z``, their probabilities ``p = softmax(z)`` and its label ``y``. A field
    that was not asked for is None. Gradients flow through ``logp``, ``entropy`` and ``lse``.

    All fields share one shape, that of the labels. Floating fields are float32 for half and single precision inputs,
    float64 for float64. Tokens whose label is -100 hold 0 (False).

    Attributes:
        logp: ``log p_y``, in nats.
        entropy: ``-sum_v p_v log p_v``, in nats.
        lse: ``log sum_v exp(z_v)``.
        mean_logit: mean of ``z`` over the vocabulary.
        is_top1: bool, True where ``y`` is the first index of the largest logit.
        log_sum_sq_probs: ``log sum_v p_v^2`` (the collision probability that WPO weights by).
        max_logp: ``log max_v p_v``, whichever class that is.
    """

    logp: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    max_logp: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The fields that were asked for, in the order of ``STATISTICS``."""
        values = ((name, getattr(self, name)) for name in STATISTICS)
        return {name: value for name, value in values if value is not None}

    def __repr__(self) -> str:
        return f"Stats({', '.join(f'{name}: {described(value)}' for name, value in self.present().items())})"
