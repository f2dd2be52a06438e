"""One checkpoint of a run by its gradients: G and its parts, and how the gradients of both sides lie to each other.

The models of the study are small enough to keep gradients as vectors. G of any group of tokens follows from one number
per token, the slope of its log-prob along the gradient of D', which forward-mode differentiation gives without an
error of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_po.diagnostics import Examples
from fused_po.diagnostics.parts import FLAT, Taken, take_apart
from fused_po.losses import Loss
from fused_po.study.estimates import ratio
from fused_po.trainers.model import token_stats_of

__all__ = ["POSITIONS", "SIDES", "THIRDS", "Moment", "Tokens", "nll_gradient", "successive"]

SIDES = {"positive": 1, "negative": -1}
# of the tokens or answers of a side by the loss's own weight, and of an answer's tokens by their place in it
THIRDS = ("top", "middle", "bottom")
POSITIONS = ("first", "middle", "last")


@dataclass(frozen=True)
class Tokens:
    """The loss tokens of a draw of D at a model's parameters, N of them.

    Attributes:
        c: (N,) float64, dL/dlogp.
        flat: (N,) float64, the same with the mean weight of the batch for all.
        role: (N,), above 0 where the token is to be learned, below 0 where unlearned.
        logp: (N,) float64.
        third: (N,) int64, an index into ``THIRDS``, within the token's side; -1 where all weights of the side are
            alike, so that it has none.
        position: (N,) int64, an index into ``POSITIONS``.
        taken: what they come from.
    """

    c: Tensor
    flat: Tensor
    role: Tensor
    logp: Tensor
    third: Tensor
    position: Tensor
    taken: Taken

    @staticmethod
    def of(model: nn.Module, examples: Examples, loss: Loss) -> Tokens:
        """Those of a batch."""
        taken = take_apart(model, [examples], loss, token_stats_of, parts=("whole", f"whole{FLAT}"))
        whole, flat, logp = taken.parts["whole"].logp, taken.parts[f"whole{FLAT}"].logp, taken.stats.logp
        assert whole is not None and flat is not None and logp is not None
        mask = examples.labels >= 0
        place = 3 * (mask.long().cumsum(1) - 1) // mask.long().sum(1, keepdim=True).clamp(min=1)  # (B, S)
        position = taken.layout.rows.gather(place.reshape(-1))
        return Tokens(whole.double(), flat.double(), taken.role, logp.double(), _thirds(taken, whole), position, taken)

    def padded(self, values: Tensor) -> Tensor:
        """Numbers of the tokens, (N,), in the shape of the labels, 0 elsewhere."""
        labels = self.taken.layout.labels
        found = values.new_zeros(labels.numel())
        self.taken.layout.rows.scatter(found, values)
        return found.reshape(labels.shape)

    def packed(self, values: Tensor) -> Tensor:
        """The other way around."""
        return self.taken.layout.rows.gather(values.reshape(-1))


def _thirds(taken: Taken, c: Tensor) -> Tensor:
    """Those of the diagnostics, where the weights of a side tell its tokens apart at all."""
    found = torch.full_like(taken.role, -1, dtype=torch.int64)
    for side, sign in SIDES.items():
        sizes = c[taken.role * sign > 0].abs()
        if sizes.numel() and sizes.max() - sizes.min() > 1e-6 * sizes.max():
            for index, third in enumerate(THIRDS):
                found[(taken.role * sign > 0) & taken.thirds[f"{side}/{third}"]] = index
    return found


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradient(value: Tensor, model: nn.Module, keep: bool = False) -> Tensor:
    """Of a scalar in all parameters, one behind the other: (P,) float64."""
    found = torch.autograd.grad(value, list(_parameters(model).values()), retain_graph=keep)
    return torch.cat([one.reshape(-1) for one in found]).double()


@torch.enable_grad()
def nll_gradient(model: nn.Module, answers: Examples) -> Tensor:
    """The gradient of the mean NLL of answers, (P,) float64."""
    logp = token_stats_of(model, answers.inputs, answers.labels, ("logp",)).logp
    assert logp is not None
    return _gradient(-logp.double().sum() / answers.labels.shape[0], model)


@torch.no_grad()
def slopes(model: nn.Module, examples: Examples, direction: Tensor) -> Tensor:
    """Of the log-prob of each token along a direction (P,) in the parameters: (B, S - 1) float64, 0 where ignored."""
    parameters = _parameters(model)
    pieces = direction.split([p.numel() for p in parameters.values()])
    along = {name: one.view_as(p).to(p.dtype) for (name, p), one in zip(parameters.items(), pieces, strict=True)}
    keep, labels = examples.labels >= 0, examples.labels.clamp(min=0).unsqueeze(-1)

    def logp(at: Mapping[str, Tensor]) -> Tensor:
        given = {**examples.inputs, "use_cache": False}
        logits = torch.func.functional_call(model, dict(at), kwargs=given).logits[:, :-1]
        return torch.where(keep, logits.double().log_softmax(-1).gather(-1, labels).squeeze(-1), 0.0)

    # the fused kernels of attention know no forward mode
    with sdpa_kernel(SDPBackend.MATH):
        found: Tensor = torch.func.jvp(logp, ({name: p.detach() for name, p in parameters.items()},), (along,))[1]
    return found


@dataclass(frozen=True)
class Moment:
    """A model and D at its parameters.

    Attributes:
        model: in eval mode.
        draws: of D, R of them.
        tokens: of each draw.
        sides: (R, 2, P) float64, the gradient of positive and of negative learning over each draw.
    """

    model: nn.Module
    draws: Sequence[Examples]
    tokens: Sequence[Tokens]
    sides: Tensor

    @staticmethod
    @torch.enable_grad()
    def of(model: nn.Module, draws: Sequence[Examples], loss: Loss) -> Moment:
        """Measure a loss on draws of D; the model is left as it was."""
        tokens, sides = [], []
        for examples in draws:
            own = Tokens.of(model, examples, loss)
            logp = token_stats_of(model, examples.inputs, examples.labels, ("logp",)).logp
            assert logp is not None
            for sign in SIDES.values():
                c = own.padded(torch.where(own.role * sign > 0, own.c, 0.0))
                sides.append(_gradient((c * logp.double()).sum(), model, keep=sign > 0))
            tokens.append(own)
        return Moment(model, draws, tokens, torch.stack(sides).unflatten(0, (len(draws), 2)))

    @property
    def wholes(self) -> Tensor:
        """The gradient of the loss over each draw, (R, P): what has no side has no part in the losses of the study."""
        return self.sides.sum(1)

    def shape(self) -> dict[str, float]:
        """How the gradients of both sides lie to each other, and how log-probs go with advantages."""
        positive, negative = self.sides.mean(0)
        sizes = positive.norm().item(), negative.norm().item()
        inner = (positive @ negative).item()
        found = {
            "gradient_norm": self.wholes.mean(0).norm().item(),
            "offset_cosine": ratio(inner, sizes[0] * sizes[1]),
            "offset_norms/positive": sizes[0],
            "offset_norms/negative": sizes[1],
            # above 1 unlearning lowers the chosen answers by more than learning raises them
            "entanglement": ratio(-inner, sizes[0] ** 2),
        }
        advantages = [one.side_inputs["advantage"] for one in self.draws if "advantage" in one.side_inputs]
        if advantages:
            pairs = zip(self.tokens, advantages, strict=True)
            each = [torch.stack([own.logp, _per_token(own, a)]).cov()[0, 1].item() for own, a in pairs]
            found["covariance"] = sum(each) / len(each)
        return found

    def towards(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """G of the whole loss over each draw of D towards gradients of D' (K, P): (R, K); and the cosine of the mean
        gradient to each of them, (K,), NaN where one is 0.
        """
        g = self.wholes @ targets.T
        size = self.wholes.mean(0).norm() * targets.norm(dim=1)
        return g, torch.where(size > 0, g.mean(0) / size, math.nan)

    def by_group(self, target: Tensor) -> dict[str, float]:
        """G of the parts towards a gradient of D', (P,): sides, their thirds, and their thirds by position.

        Those of thirds are NaN where the weights of a side are all alike.
        """
        found: dict[str, float] = {}
        for examples, own in zip(self.draws, self.tokens, strict=True):
            slope = own.packed(slopes(self.model, examples, target))
            for name, rows in _groups(own):
                for suffix, c in (("", own.c), (FLAT, own.flat)):
                    value = math.nan if rows is None else (c * slope)[rows].sum().item() / len(self.draws)
                    if not (suffix and name.startswith("table")):
                        found[name + suffix] = found.get(name + suffix, 0.0) + value
        return found


def _groups(own: Tokens) -> Iterator[tuple[str, Tensor | None]]:
    """Names of parts and their tokens; None where they are not defined."""
    for side, sign in SIDES.items():
        of_side = own.role * sign > 0
        yield f"G/{side}", of_side
        alike = bool((own.third[of_side] < 0).any())
        for number, third in enumerate(THIRDS):
            of_third = of_side & (own.third == number)
            yield f"G/{side}/{third}", None if alike else of_third
            for place, position in enumerate(POSITIONS):
                yield f"table/{side}/{third}/{position}", None if alike else of_third & (own.position == place)


def _per_token(own: Tokens, advantage: Tensor) -> Tensor:
    spread = advantage.unsqueeze(1).expand(own.taken.layout.labels.shape) if advantage.ndim == 1 else advantage
    return own.packed(spread.contiguous()).double()


def successive(before: Tensor, after: Tensor) -> dict[str, float]:
    """The cosine between gradients of two checkpoints, (R, P) each, a row for each draw of D: of their means, and
    corrected for what the rows of a checkpoint differ in.

    Products of two different draws hold no square of their noise, so their mean estimates the length of the true
    gradient. One draw is taken as exact. The corrected cosine is NaN where that estimate is not above 0.
    """
    inner = (before.mean(0) @ after.mean(0)).item()
    raw = before.mean(0).norm().item() * after.mean(0).norm().item()
    squares = [_square(one) for one in (before, after)]
    true = math.sqrt(squares[0] * squares[1]) if min(squares) > 0.0 else 0.0
    return {"successive": ratio(inner, true), "successive/uncorrected": ratio(inner, raw)}


def _square(draws: Tensor) -> float:
    count = draws.shape[0]
    if count == 1:
        return draws[0].square().sum().item()
    together, single = draws.sum(0).square().sum().item(), draws.square().sum().item()
    return (together - single) / (count * (count - 1))
