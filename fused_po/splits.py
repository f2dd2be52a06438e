"""The components of preference optimization as operations on coefficients: positive learning, negative learning and
loss reweighting, each scaled, scheduled or taken away.

"What Is Preference Optimization Doing, How and Why?" (arXiv 2512.00778) takes DPO and PPO apart like this; here it
works for every loss, because a loss is its coefficients c = dL/dlogp.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.losses.contract import HORIZONS, Loss, require_sides
from fused_po.schedules import Linear, Schedule, lines, require_real

__all__ = [
    "Linear",
    "Split",
    "check_split",
    "controlled_dpo",
    "controlled_ppo",
    "negative_only",
    "no_reweighting",
    "nsr",
    "positive_only",
    "psr",
    "w_reinforce",
]

REWEIGHTS = ("identity", "none", "clip", "power", "tertiles")
# what needs the mean weight of the population, or its thirds
OF_POPULATION = ("none", "tertiles")


@dataclass(frozen=True)
class Split:
    """Scales positive learning, negative learning and the weights of samples (arXiv 2512.00778), in any loss that has
    sides.

    With c = dL/dlogp of a token, it becomes ``c s f(w) / w``: s is ``positive`` or ``negative``, by the token's side; w
    is the loss's own weight, sigmoid(-beta h) for DPO and |A| for PPO, and f says what becomes of it. Terms without a
    side (KL, NLL, entropy) stay as they are. The gradient changes, the reported value of the loss does not. It costs a
    few operations a token.

    Args:
        positive: weight of positive learning, a number or a schedule of the fraction of the training, 1.0.
        negative: weight of negative learning, likewise.
        reweight: f: ``identity``; ``none``, the mean weight of the population; ``clip``, min(w, ``clip_max``);
            ``power``, w^``power``; ``tertiles``, w times ``tertile_gains`` of its third; or a function from weights
            (M,) to weights (M,).
        by: what tells the sides apart. ``role``: chosen or rejected, or the sign of the advantage, as in the paper.
            ``direction``: whether the gradient raises or lowers the log-prob; it differs from ``role`` where a loss
            pulls a chosen answer down (SPPO beyond its target).
        population: of which samples the mean and the thirds are taken; a sample is an answer where the loss weighs
            answers, else a token. ``horizon``: of what the loss sees at once, a pair of DPO or a token of PPO; the mean
            of so few is their own weight, and they have no thirds. ``batch``: of the whole call, which the loss then
            has to see at once. ``running``: given as ``running_mean`` and ``running_tertiles``.
        clip_max: bound of ``clip``.
        power: exponent of ``power``.
        tertile_gains: gains of the third with the largest weights, the middle and the smallest.
        running_mean: the mean weight, for ``population="running"``.
        running_tertiles: the bounds of the middle third by weight, likewise.
        progress: the fraction of the training that is done, in [0, 1]; a split with a schedule needs it, and ``at``
            sets it.
        allow_negative: False: a weight below 0 is an error, since it turns learning around.

    Raises:
        ValueError: a number out of range, an unknown word, or a statistic that is missing; where it is used, a schedule
            without a ``progress``, or a loss that has no sides.
    """

    positive: float | Schedule = 1.0
    negative: float | Schedule = 1.0
    reweight: str | Callable[[Tensor], Tensor] = "identity"
    by: str = "role"
    population: str = "horizon"
    clip_max: float = 1.0
    power: float = 1.0
    tertile_gains: tuple[float, float, float] = (1.0, 1.0, 1.0)
    running_mean: float | None = None
    running_tertiles: tuple[float, float] | None = None
    progress: float | None = None
    allow_negative: bool = False

    def __post_init__(self) -> None:
        if self.progress is not None and not 0.0 <= self.progress <= 1.0:
            raise ValueError(f"progress must lie in [0, 1], the fraction of the training: got {self.progress}")
        for name, choices in (("by", ("role", "direction")), ("population", ("batch", "horizon", "running"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.reweight, str) and self.reweight not in REWEIGHTS:
            raise ValueError(f"reweight must be a function or one of {', '.join(REWEIGHTS)}, got {self.reweight!r}")
        if not self.clip_max > 0 or not self.power >= 0:
            raise ValueError(f"clip_max must be above 0 and power at least 0: got {self.clip_max} and {self.power}")
        if self.population == "running" and self.reweight in OF_POPULATION:
            needed = "running_tertiles" if self.reweight == "tertiles" else "running_mean"
            if getattr(self, needed) is None:
                raise ValueError(f"population='running' with reweight={self.reweight!r} needs {needed}")
        for name in ("positive", "negative"):
            if not callable(getattr(self, name)):
                require_real(name, getattr(self, name), " or a schedule, as Linear(start=1.0, end=0.0)")
        if not isinstance(self.tertile_gains, Sequence) or len(self.tertile_gains) != 3:
            raise ValueError(f"tertile_gains must be three numbers: got {self.tertile_gains!r}")
        for gain in self.tertile_gains:
            require_real("each of tertile_gains", gain)
        # a bad schedule shows before the training, not in it
        for gain in (*self._at(self.progress or 0.0), *self._at(0.0), *self._at(1.0), *self.tertile_gains):
            if not math.isfinite(gain) or (gain < 0 and not self.allow_negative):
                raise ValueError(f"weights must be finite and at least 0 (else allow_negative=True): got {gain}")

    def at(self, progress: float) -> Split:
        """The split at a fraction of the training: ``split.at(step / steps)``."""
        return replace(self, progress=progress)

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of positive and negative learning now.

        Raises:
            ValueError: they follow a schedule, and nobody said how far the training is.
        """
        if self.progress is None and (callable(self.positive) or callable(self.negative)):
            raise ValueError(
                "the weights of this split follow a schedule, so it must be told how far the training is: give "
                "split.at(step / steps) in each step"
            )
        return self._at(self.progress or 0.0)

    def horizon(self, loss: Loss) -> str:
        """What a loss must see whole under this split.

        Raises:
            ValueError: thirds of a population too small to have any.
        """
        if self.population == "batch" and self.reweight in OF_POPULATION:
            return HORIZONS[-1]
        small = self.population == "horizon" and loss.horizon in ("token", "sequence", "pair")
        if small and self.reweight == "tertiles":
            raise ValueError(
                f"a {loss.horizon}, the horizon of {loss.name!r}, has no thirds: take population='batch' or 'running'"
            )
        return loss.horizon

    def silent(self, role: Tensor) -> Tensor | None:
        """(N,) bool, rows of a side (N,) that counts 0 now; None where that follows from c alone, or no side does."""
        positive, negative = self.weights
        if self.by != "role" or (positive != 0.0 and negative != 0.0):
            return None
        dead = torch.zeros_like(role, dtype=torch.bool)
        if positive == 0.0:
            dead = dead | (role > 0)
        return dead | (role < 0) if negative == 0.0 else dead

    def __call__(self, c: Tensor, role: Tensor, weight: Tensor, batch: Batch, loss: Loss) -> Tensor:
        """The coefficients (N,) of the sided terms of a loss, scaled.

        Args:
            c: (N,).
            role: (N,), +1, -1 or 0.
            weight: (N,), the loss's own weight, >= 0.
            batch: the same tokens.
            loss: whose coefficients they are.
        """
        sides = role if self.by == "role" else -c.sign()
        positive, negative = self.weights
        gain = torch.where(sides > 0, positive, torch.where(sides < 0, negative, torch.ones_like(c)))
        return c * gain * torch.where(sides == 0, 1.0, self._reweighting(weight, batch, loss))

    def _reweighting(self, weight: Tensor, batch: Batch, loss: Loss) -> Tensor:
        """f(w) / w per token, 1 where w is 0: the coefficient is 0 there."""
        if self.reweight == "identity":
            return torch.ones_like(weight)
        samples = batch.mean_per_sequence(weight) if loss.weighs_sequences else weight  # (M,)
        if callable(self.reweight):
            new = self.reweight(samples)
            if not isinstance(new, Tensor) or new.shape != samples.shape:
                raise ValueError(f"reweight must return weights {tuple(samples.shape)} for weights of that shape")
        elif self.reweight == "clip":
            new = samples.clamp(max=self.clip_max)
        elif self.reweight == "power":
            new = samples.pow(self.power)
        else:
            groups = _groups(batch, self.horizon(loss), loss.weighs_sequences)
            new = self._mean(samples, groups) if self.reweight == "none" else samples * self._gains(samples, groups)
        ratio = torch.where(samples > 0, new / samples, 1.0)
        return batch.spread(ratio) if loss.weighs_sequences else ratio

    def _mean(self, samples: Tensor, groups: Tensor) -> Tensor:
        if self.population == "running":
            return torch.full_like(samples, self.running_mean or 0.0)
        # sorted and summed by segment: adding by index has no fixed order on a GPU
        sizes = _sizes(groups)
        ordered = samples[groups.argsort(stable=True)]
        totals = torch.segment_reduce(ordered, "sum", lengths=sizes, unsafe=True, initial=0.0)
        return (totals / sizes.clamp_min(1))[groups]

    def _gains(self, samples: Tensor, groups: Tensor) -> Tensor:
        top, middle, bottom = self.tertile_gains
        if self.population == "running":
            assert self.running_tertiles is not None
            low, high = self.running_tertiles
            thirds = (samples >= low).long() + (samples > high).long()
        else:
            thirds = tertiles(samples, groups)
        return torch.where(thirds == 2, top, torch.where(thirds == 1, middle, samples.new_full((), bottom)))

    def _at(self, progress: float) -> tuple[float, float]:
        positive, negative = (side(progress) if callable(side) else side for side in (self.positive, self.negative))
        try:
            return float(positive), float(negative)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a schedule must return a number: got {positive!r} and {negative!r}") from error


def check_split(split: object, loss: Loss) -> None:
    """Whether ``split`` is one, or None, and does something to a loss now.

    Raises:
        ValueError: something else, a loss none of whose tokens has a side, or a schedule that was not told how far the
            training is.
    """
    if split is None:
        return
    if not isinstance(split, Split):
        raise ValueError(f"split must be a fused_po.Split, as the presets of fused_po.splits return: got {split!r}")
    require_sides(loss, "a split")
    split.horizon(loss)
    # asked for its error
    _ = split.weights
    _warn_of_own_mean(split, loss)


def _warn_of_own_mean(split: Split, loss: Loss) -> None:
    """Say where the mean weight is that of one sample, or of one pair: DPO's have one weight."""
    if torch.compiler.is_compiling() or split.reweight != "none" or split.population != "horizon":
        return
    if loss.horizon in (("sequence", "pair") if loss.weighs_sequences else ("token",)):
        itself = "its own weight"
        if loss.horizon == "pair":
            itself = "the weight that both answers have, where the loss is of their margin as DPO is"
        warnings.warn(
            f"reweight='none' takes the mean weight over a {loss.horizon}, the horizon of {loss.name!r}, which is "
            f"{itself}: take population='batch' (as splits.no_reweighting() does) or 'running'",
            stacklevel=4,
        )


def tertiles(samples: Tensor, groups: Tensor) -> Tensor:
    """The third of each sample within its group, 2 for the largest: sizes differ by one at most, ties go in order.

    Args:
        samples: (M,).
        groups: (M,) int64 in [0, M].

    Returns:
        (M,) int64.
    """
    order = samples.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = _sizes(groups)
    place = torch.empty_like(groups)
    place[order] = torch.arange(samples.shape[0], device=samples.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    return 3 * place // sizes[groups]


def _sizes(groups: Tensor) -> Tensor:
    """How many samples each group has: (M,) in [0, M] -> (M + 1,) int64."""
    return groups.new_zeros(groups.shape[0] + 1).index_add(0, groups, torch.ones_like(groups))


def _groups(batch: Batch, horizon: str, per_sequence: bool) -> Tensor:
    """Which population each sample belongs to, one of its own for those without loss: (M,) int64 in [0, M]."""
    if horizon == "token" and not per_sequence:
        # single tokens belong to no sequence here
        tokens = batch.loss_tokens()
        return torch.arange(tokens.shape[0], device=tokens.device)
    count = batch.lengths.shape[0]
    found = torch.arange(count, device=batch.lengths.device)
    if not per_sequence:
        # named by its first token: there may be more sequences, empty ones, than tokens
        found = batch.segments.cumsum(0) - batch.segments
    if horizon in ("group", "batch"):
        found = torch.zeros_like(found)
    elif horizon == "pair":
        chosen, rejected = batch.halves(found)
        found = torch.where(batch.halves(batch.segments)[0] > 0, chosen, rejected).repeat(2)
    if per_sequence:
        return torch.where(batch.lengths > 0, found, count)
    return torch.where(batch.loss_tokens(), batch.spread(found), batch.chosen.shape[0])


def positive_only() -> Split:
    """Learning from chosen answers (positive advantages) alone."""
    return Split(negative=0.0)


def negative_only() -> Split:
    """Learning from rejected answers (negative advantages) alone."""
    return Split(positive=0.0)


def no_reweighting(population: str = "batch", running_mean: float | None = None) -> Split:
    """Every sample weighs what the mean sample does."""
    return Split(reweight="none", population=population, running_mean=running_mean)


def controlled_dpo(
    positive: tuple[float, float] = (1.0, 1.0),
    negative: tuple[float, float] = (0.0, 1.0),
    begin: float = 0.0,
    finish: float = 1.0,
) -> Split:
    """A gradual shift from positive to negative learning (arXiv 2512.00778). The paper's constants and the shape of its
    schedule are not known; here both weights move in straight lines. By default negative learning comes in until the
    loss is DPO itself: a negative weight above the positive one takes a model apart (docs/study.md).

    Args:
        positive: weights of positive learning at the beginning and at the end.
        negative: weights of negative learning, likewise.
        begin: 0.0, the fraction of the training at which they begin to move.
        finish: 1.0, the one at which they stop.
    """
    return Split(*lines(positive, negative, begin, finish))


def controlled_ppo(
    positive: tuple[float, float] = (1.0, 1.0),
    negative: tuple[float, float] = (1.0, 0.5),
    tertile_gains: tuple[float, float, float] = (1.0, 1.0, 1.0),
    begin: float = 0.0,
    finish: float = 1.0,
) -> Split:
    """Less exploration towards the end, and token groups told apart by |A|. The formulas of the paper's controlled PPO
    are not known; every constant here is ours and an argument.

    Args:
        positive: weights of positive learning at the beginning and at the end.
        negative: weights of negative learning, which is what explores, likewise.
        tertile_gains: gains of the top, middle and bottom third by |A|, in the batch.
        begin: 0.0, the fraction of the training at which they begin to move.
        finish: 1.0, the one at which they stop.
    """
    flat = isinstance(tertile_gains, Sequence) and set(tertile_gains) == {1.0}
    sides = lines(positive, negative, begin, finish)
    return Split(*sides, "identity" if flat else "tertiles", population="batch", tertile_gains=tertile_gains)


def psr() -> Split:
    """Positive sample reinforcement (arXiv 2506.01347): the same as ``positive_only``."""
    return positive_only()


def nsr() -> Split:
    """Negative sample reinforcement (arXiv 2506.01347): the same as ``negative_only``."""
    return negative_only()


def w_reinforce(positive: float = 0.1) -> Split:
    """W-REINFORCE (arXiv 2506.01347): positive learning at a tenth."""
    return Split(positive=positive)
