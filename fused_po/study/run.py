"""One seed of the study: the supervised start, then every arm of every method, each measured at its checkpoints."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_po import losses
from fused_po.diagnostics import Examples, alignment_over_checkpoints, learning_dynamics
from fused_po.ops import stats_loss
from fused_po.study.learners import (
    MAX_TOKENS,
    Learner,
    PairLearner,
    RolloutLearner,
    alignments,
    pair_examples,
    supervise,
)
from fused_po.study.policy import Language, Sample, new_model, sample, tiny_tokenizer
from fused_po.study.settings import ARMS, METHODS, Settings
from fused_po.study.task import Prompt, all_prompts, demonstration, reward
from fused_po.trainers.model import token_stats_of

__all__ = ["Bin", "Point", "Results", "check", "run_seed", "total_updates"]

HELD_OUT = 0.15
# answers drawn for a prompt in search of a right and a wrong one
TRIES = 4
SEARCHES = 40

# step, D by parts, draws of D
Kept = tuple[int, Examples, list[Examples]]


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


def total_updates(settings: Settings) -> int:
    """How many updates a seed takes."""
    return settings.sft_steps + settings.steps * sum(len(ARMS[method]) for method in METHODS)


def check(settings: Settings) -> None:
    """Try what a study takes from the machine it runs on.

    Raises:
        ValueError: a device that is not there, a model or a tokenizer that can't be loaded.
    """
    try:
        torch.empty(0, device=settings.device)
    # what torch says of a missing GPU is an AssertionError
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"device {settings.device!r} can't be used: {first}") from None
    if settings.model != "tiny":
        _load(settings, 0)


def _load(settings: Settings, seed: int) -> tuple[Language, Any]:
    if settings.model == "tiny":
        tokenizer = tiny_tokenizer()
        model = new_model(tokenizer, settings.hidden_size, settings.layers, seed)
    else:
        from fused_po.trainers.loading import load_model, load_tokenizer

        tokenizer = load_tokenizer(settings.model, [])
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {settings.model!r} has no end-of-sequence token")
        model = load_model(settings.model, tokenizer, seed)
    return Language(tokenizer), model.to(settings.device)


def run_seed(seed: int, settings: Settings, advance: Callable[[int], Any] = lambda steps: None) -> Results:
    """Run one seed.

    Args:
        seed: of the tiny model, the demonstrations, the pairs and all sampling.
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
        self.language, self.start = _load(settings, seed)

    def go(self) -> Results:
        torch.manual_seed(self.seed)
        for _ in supervise(self.start, self.language, self._demonstrations(), self.settings):
            self.advance(1)
        pairs, probes = (
            self._pairs(self.train, self.settings.pairs),
            self._pairs(self.held_out, self.settings.samples // 2),
        )
        self.probes = pair_examples(self.start, self.language, probes, self.start.device)
        for method in METHODS:
            for arm, split in ARMS[method].items():
                torch.manual_seed(self.seed)
                common = (split, self.settings, self.seed)
                learner: Learner
                if method == "dpo":
                    learner = PairLearner(self.start, self.language, pairs, *common)
                else:
                    learner = RolloutLearner(self.start, self.language, self.train, *common)
                self._arm(method, arm, learner)
        return self.results

    def _arm(self, method: str, arm: str, learner: Learner) -> None:
        settings = self.settings
        last = settings.checkpoints - 1
        due = {round(settings.steps * index / last) for index in range(settings.checkpoints)}
        with tempfile.TemporaryDirectory(prefix="fused-po-study-") as folder:
            kept: dict[Path, Kept] = {}
            for step in range(settings.steps + 1):
                if step in due:
                    self._record(method, arm, step, self._evaluate(learner.model))
                    if arm == "full":
                        kept[self._keep(Path(folder), step, learner)] = step, *learner.examples()
                if step < settings.steps:
                    learner.step()
                    self.advance(1)
            if arm == "full":
                self._align(method, learner, kept)

    def _keep(self, folder: Path, step: int, learner: Learner) -> Path:
        path = folder / f"step-{step:06d}"
        learner.model.save_pretrained(path)  # type: ignore[operator]
        self.language.tokenizer.save_pretrained(path)
        return path

    def _align(self, method: str, learner: Learner, kept: dict[Path, Kept]) -> None:
        """G over the checkpoints, with D' from the final model, and what the loss does at each of them."""
        prompts = random.Random(self.seed).choices(self.train, k=self.settings.samples)
        final = sample(learner.model, self.language, prompts, MAX_TOKENS)
        batch = self.language.pad(final, learner.device)
        target = Examples({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, batch.labels)

        def batches(model: nn.Module, folder: Path) -> Sequence[Examples]:
            step, examples, draws = kept[folder]
            dynamics = learning_dynamics(model, [examples], learner.loss)
            self._record(method, "full", step, dynamics.flat())
            wholes = alignments(model, draws, learner.loss, target)
            numbers = {f"G/draw {index}": value for index, value in enumerate(wholes)}
            self._record(method, "full", step, numbers | {"G": statistics.fmean(wholes)})
            for side, histogram in dynamics.coefficients.items():
                edges = histogram.edges.tolist()
                self.results.bins += [
                    Bin(self.seed, method, step, side, left, right, count)
                    for left, right, count in zip(edges, edges[1:], histogram.counts.tolist(), strict=False)
                ]
            return [examples]

        found = alignment_over_checkpoints(
            list(kept),
            batches,
            learner.loss,
            [target],
            tokenizer=self.language.tokenizer,
            device=learner.device,
            method=self.settings.estimator,
        )
        for folder, alignment in found.items():
            self._record(method, "full", kept[folder][0], {f"G/{part}": alignment[part] for part in alignment.values})

    def _evaluate(self, model: Any) -> dict[str, float]:
        # the same draws for every arm and step, and training goes on as if there had been none
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            return self._measure(model)

    def _measure(self, model: Any) -> dict[str, float]:
        model.eval()
        found = {}
        for name, prompts in (("train", self.train), ("held_out", self.held_out)):
            drawn = random.Random(self.seed).choices(prompts, k=self.settings.samples)
            samples = sample(model, self.language, drawn, MAX_TOKENS)
            right = [one for one in samples if reward(one.prompt, one.text)]
            found[f"reward/{name}"] = len(right) / len(samples)
            found[f"distinct/{name}"] = len({(one.prompt, one.text) for one in samples}) / len(samples)
            batch = self.language.pad(samples, model.device)
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            stats = token_stats_of(model, inputs, batch.labels, ("logp", "entropy"))
            before = token_stats_of(self.start, inputs, batch.labels).logp
            keep = batch.labels != -100
            assert stats.entropy is not None and stats.logp is not None and before is not None
            found[f"entropy/{name}"] = stats.entropy[keep].mean().item()
            found[f"kl/{name}"] = (stats.logp - before).double().sum(1).mean().item()
        found["reward/gap"] = found["reward/train"] - found["reward/held_out"]
        return found | self._probe(model)

    def _probe(self, model: Any) -> dict[str, float]:
        """Held-out pairs, right and wrong answers of the start: log-probs, squeezing, and DPO's own loss."""
        loss = losses.create("sigmoid", beta=self.settings.beta)
        labels = self.probes.labels
        outputs = (*loss.statistics, "max_logp")
        stats = token_stats_of(model, self.probes.inputs, labels, outputs)
        assert stats.logp is not None and stats.max_logp is not None
        found = {"dpo_loss/held_out": stats_loss(stats, labels, loss, **self.probes.side_inputs).loss.item()}
        half = labels.shape[0] // 2
        for side, rows in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
            keep = labels[rows] != -100
            drift = stats.logp[rows].double().sum(1) - self.probes.side_inputs["ref_logp"][rows]
            found[f"drift/{side}"] = drift.mean().item()
            found[f"max_prob/{side}"] = stats.max_logp[rows][keep].exp().mean().item()
        return found

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
