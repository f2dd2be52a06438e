"""One seed of the study: the supervised start, then every arm of every method, each measured at its checkpoints."""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_po.diagnostics import Examples
from fused_po.study.estimates import ratio
from fused_po.study.evaluation import Evaluation
from fused_po.study.learners import (
    MAX_TOKENS,
    Learner,
    PairLearner,
    RolloutLearner,
    supervise,
)
from fused_po.study.moment import SIDES, Moment, nll_gradient, successive
from fused_po.study.policy import Language, Sample, new_model, sample, tiny_tokenizer
from fused_po.study.settings import ARMS, METHODS, Settings
from fused_po.study.task import Prompt, all_prompts, demonstration, reward

__all__ = ["Bin", "Point", "Results", "run_seed", "total_updates"]

HELD_OUT = 0.15
# answers drawn for a prompt in search of a right and a wrong one
TRIES = 4
SEARCHES = 40
BINS = 40
# of PPO's histogram: advantages are whitened
LARGEST_ADVANTAGE = 4.0


@dataclass(frozen=True)
class Point:
    """A number of one run at one step."""

    seed: int
    method: str
    arm: str
    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Bin:
    """A bar of the histogram of k = -dL/dlogp at one step."""

    seed: int
    method: str
    step: int
    side: str
    left: float
    right: float
    count: float


@dataclass
class Results:
    """All numbers of a study."""

    points: list[Point] = field(default_factory=list)
    bins: list[Bin] = field(default_factory=list)

    def __iadd__(self, other: Results) -> Results:
        self.points += other.points
        self.bins += other.bins
        return self


def total_updates(settings: Settings) -> int:
    """How many updates a seed takes."""
    return settings.sft_steps + settings.steps * sum(len(ARMS[method]) for method in METHODS)


def run_seed(seed: int, settings: Settings, advance: Callable[[int], Any] = lambda steps: None) -> Results:
    """Run one seed.

    Args:
        seed: of the model, the demonstrations, the pairs and all sampling.
        settings: see ``Settings``.
        advance: called with the number of updates done since the last call; ``total_updates`` in all.

    Raises:
        ValueError: a start that never, or always, answers rightly: there is nothing to learn from.
        FloatingPointError: a training that diverges.
    """
    return _Seed(seed, settings, advance).go()


class _Seed:
    def __init__(self, seed: int, settings: Settings, advance: Callable[[int], Any]) -> None:
        self.seed, self.settings, self.advance = seed, settings, advance
        self.results = Results()
        self.train, self.held_out = all_prompts(settings.largest, HELD_OUT, seed)
        tokenizer = tiny_tokenizer()
        self.language = Language(tokenizer)
        self.start = new_model(tokenizer, settings.hidden_size, settings.layers, seed).to(settings.device)

    def go(self) -> Results:
        settings = self.settings
        torch.manual_seed(self.seed)
        for _ in supervise(self.start, self.language, self._demonstrations(), settings):
            self.advance(1)
        pairs, probes = self._pairs(self.train, settings.pairs), self._pairs(self.held_out, settings.samples // 2)
        self.evaluate = Evaluation(
            self.start,
            self.language,
            settings,
            {"train": self.train, "held_out": self.held_out},
            {"train": pairs[: settings.samples // 2], "held_out": probes},
            self.seed,
        )
        self.first = self.evaluate(self.start)
        for method in METHODS:
            for name, arm in ARMS[method].items():
                torch.manual_seed(self.seed)
                common = (arm, settings, self.seed)
                learner: Learner
                if method == "dpo":
                    learner = PairLearner(self.start, self.language, pairs, *common)
                else:
                    learner = RolloutLearner(self.start, self.language, self.train, *common)
                self._arm(method, name, learner)
        return self.results

    def _arm(self, method: str, arm: str, learner: Learner) -> None:
        settings = self.settings
        kept: dict[int, tuple[dict[str, Tensor], list[Examples]]] = {}
        for step in range(settings.steps + 1):
            if step in settings.measured:
                self._record(method, arm, step, self.evaluate(learner.model) if step else self.first)
                if arm == "full":
                    kept[step] = copy.deepcopy(learner.model.state_dict()), learner.examples()
            if step < settings.steps:
                learner.step()
                self.advance(1)
        if arm == "full":
            self._look_back(method, learner, kept)

    def _look_back(
        self, method: str, learner: Learner, kept: dict[int, tuple[dict[str, Tensor], list[Examples]]]
    ) -> None:
        """The gradients at each checkpoint, and G towards answers of the final model and of every other."""
        model = copy.deepcopy(learner.model).eval()
        final = [self._draw(model, index) for index in range(self.settings.final_draws)]
        greedy = self._examples(sample(model, self.language, self.train, MAX_TOKENS, greedy=True))
        moving = {}
        for step, (state, _) in kept.items():
            model.load_state_dict(state)
            moving[step] = self._draw(model, self.settings.final_draws)
        before = None
        for step, (state, draws) in kept.items():
            model.load_state_dict(state)
            moment = Moment.of(model, draws, learner.loss)
            if before is not None:
                self._record(method, "full", step, successive(before, moment.wholes))
            before = moment.wholes
            numbers = moment.shape() | self._alignment(moment, final, greedy)
            each = torch.stack([nll_gradient(model, answers) for answers in moving.values()])
            cosines = moment.towards(each)[1].tolist()
            numbers |= {f"time/{other}": value for other, value in zip(moving, cosines, strict=True)}
            self._record(method, "full", step, numbers)
            self._histogram(method, step, moment)

    def _alignment(self, moment: Moment, final: Sequence[Examples], greedy: Examples) -> dict[str, float]:
        """G towards D' as sampled, the mean of its draws, and as greedy; and the mean of these two."""
        draws = torch.stack([nll_gradient(moment.model, answers) for answers in final])  # (K, P)
        kinds = torch.stack([draws.mean(0), nll_gradient(moment.model, greedy)])
        g, cosines = moment.towards(kinds)
        sampled, one = g.mean(0).tolist()
        found = {"G/sampled": sampled, "G/greedy": one, "G": (sampled + one) / 2}
        found |= {f"G/draw {index}": value for index, value in enumerate(g.mean(1).tolist())}
        found |= {f"G/final {index}": value for index, value in enumerate(moment.towards(draws)[0].mean(0).tolist())}
        found |= {"cosine/sampled": cosines[0].item(), "cosine/greedy": cosines[1].item()}
        found["cosine"] = cosines.mean().item()
        parts = [moment.by_group(kind) for kind in kinds]
        found |= {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
        size = moment.wholes.mean(0).norm().item()
        scales = [size * kind.norm().item() for kind in kinds]
        for side in SIDES:
            own = [ratio(part[f"G/{side}"], scale) for part, scale in zip(parts, scales, strict=True)]
            found[f"cosine/{side}"] = statistics.fmean(own)
        return found

    def _draw(self, model: Any, index: int) -> Examples:
        """An answer to each training prompt, drawn from a model; the same random numbers for the same index."""
        with torch.random.fork_rng():
            torch.manual_seed((self.seed << 8) + index)
            return self._examples(sample(model, self.language, self.train, MAX_TOKENS))

    def _examples(self, answers: Sequence[Sample]) -> Examples:
        batch = self.language.pad(answers, self.start.device)
        return Examples({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, batch.labels)

    def _histogram(self, method: str, step: int, moment: Moment) -> None:
        """k of all draws, in units of one pair or one token: beta w for DPO, r A for PPO."""
        widest = self.settings.beta if method == "dpo" else LARGEST_ADVANTAGE
        for side, sign in SIDES.items():
            counts = torch.zeros(BINS, dtype=torch.float64)
            for examples, own in zip(moment.draws, moment.tokens, strict=True):
                units = examples.labels.shape[0] / 2 if method == "dpo" else own.c.numel()
                k = -own.c[own.role * sign > 0].cpu() * units
                edges_of = torch.histogram(k.clamp(-widest, widest), BINS, range=(-widest, widest))
                counts += edges_of.hist
            edges = edges_of.bin_edges.tolist()
            self.results.bins += [
                Bin(self.seed, method, step, side, left, right, count)
                for left, right, count in zip(edges, edges[1:], counts.tolist(), strict=False)
            ]

    def _demonstrations(self) -> Iterator[list[Sample]]:
        draw = random.Random(self.seed)
        while True:
            prompts = draw.choices(self.train, k=self.settings.sft_batch)
            yield [self.language.written(p, demonstration(p, self.settings.noise, draw)) for p in prompts]

    def _pairs(self, prompts: Sequence[Prompt], count: int) -> list[tuple[Sample, Sample]]:
        """A right and a wrong answer of the start to prompts in random order."""
        draw, found = random.Random(self.seed), []
        for _ in range(SEARCHES):
            asked = draw.choices(prompts, k=max(64, count))
            answers = sample(self.start, self.language, [p for p in asked for _ in range(TRIES)], MAX_TOKENS)
            for first in range(0, len(answers), TRIES):
                group = answers[first : first + TRIES]
                right = [one for one in group if reward(one.prompt, one.text)]
                wrong = [one for one in group if not reward(one.prompt, one.text)]
                if right and wrong:
                    found.append((right[0], wrong[0]))
            if len(found) >= count:
                return found[:count]
        raise ValueError(
            f"{len(found)} of {count} pairs after {SEARCHES * max(64, count)} prompts: the start answers too well or "
            "too badly; other --sft-steps or --noise?"
        )

    def _record(self, method: str, arm: str, step: int, numbers: dict[str, float]) -> None:
        self.results.points += [Point(self.seed, method, arm, step, name, value) for name, value in numbers.items()]
