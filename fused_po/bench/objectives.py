"""The losses of the benchmark: this project's, and the same written out on log-probs and entropies for the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po import losses
from fused_po.losses import Loss

__all__ = ["OBJECTIVES", "Objective"]

EPSILON, KL_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.04, 0.01


class Inputs(Protocol):
    """What formulas read of a problem."""

    beta: float
    ref_logp: Tensor  # (B,)
    old_logp: Tensor  # (B, S)
    ref_token_logp: Tensor  # (B, S)
    advantage: Tensor  # (B,)
    desirable: Tensor  # (B,)
    kl: Tensor  # ()


# log-probs (B, S) and entropies (B, S) or None to the loss ()
Written = Callable[[Inputs, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss.

    Attributes:
        title: what its users call it.
        loss: this project's, of the problem's beta.
        inputs: side inputs, from name to attribute of the problem.
        written: the formula.
        entropy: the gradient also flows through the entropy.
        sequences: the loss reads sums over sequences and a reference.
    """

    title: str
    loss: Callable[[float], Loss]
    inputs: dict[str, str]
    written: Written
    entropy: bool = False
    sequences: bool = False

    def side_inputs(self, problem: Inputs) -> dict[str, Any]:
        """Keyword arguments of ``linear_loss``."""
        return {name: getattr(problem, attribute) for name, attribute in self.inputs.items()}


def _log_ratios(problem: Inputs, logp: Tensor) -> Tensor:
    """(B,) in float64."""
    return logp.sum(1, dtype=torch.float64) - problem.ref_logp


def _dpo(problem: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    chosen, rejected = _log_ratios(problem, logp).chunk(2)
    return F.softplus(-problem.beta * (chosen - rejected)).mean()


def _kto(problem: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    sign = torch.where(problem.desirable, 1.0, -1.0)
    return torch.sigmoid(-problem.beta * (_log_ratios(problem, logp) - problem.kl) * sign).mean()


def _surrogate(problem: Inputs, logp: Tensor) -> Tensor:
    """(B, S)."""
    ratio, advantage = (logp - problem.old_logp).exp(), problem.advantage.unsqueeze(1)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)


def _dapo(problem: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    return _surrogate(problem, logp).mean()


def _grpo(problem: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    away = problem.ref_token_logp - logp
    return (_surrogate(problem, logp) + KL_WEIGHT * (away.exp() - away - 1)).mean(1).mean()


def _ppo(problem: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    assert entropy is not None
    return _surrogate(problem, logp).mean() - ENTROPY_WEIGHT * entropy.mean()


def _sft(problem: Inputs, logp: Tensor, entropy: Tensor | None) -> Tensor:
    return -logp.mean()


_POLICY = {"old_logp": "old_logp", "advantage": "advantage"}
OBJECTIVES = {
    "dpo": Objective(
        "DPO (sigmoid)",
        lambda beta: losses.create("sigmoid", beta=beta),
        {"ref_logp": "ref_logp"},
        _dpo,
        sequences=True,
    ),
    "dapo": Objective("DAPO", lambda beta: losses.create("dapo", epsilon=EPSILON), _POLICY, _dapo),
    "grpo": Objective(
        "GRPO with a KL penalty",
        lambda beta: losses.create("grpo", epsilon=EPSILON, beta=KL_WEIGHT, use_bias_correction_kl=False),
        {**_POLICY, "ref_logp": "ref_token_logp"},
        _grpo,
    ),
    "ppo": Objective(
        "PPO with an entropy bonus",
        lambda beta: losses.create("ppo", epsilon=EPSILON, entropy_coef=ENTROPY_WEIGHT),
        _POLICY,
        _ppo,
        entropy=True,
    ),
    "kto": Objective(
        "KTO",
        lambda beta: losses.create("kto", beta=beta),
        {"ref_logp": "ref_logp", "desirable": "desirable", "kl": "kl"},
        _kto,
        sequences=True,
    ),
    "sft": Objective("SFT", lambda beta: losses.create("sft"), {}, _sft),
}
