"""What a policy does: rewards, entropy and drift on its own answers, and DPO's numbers on pairs of the start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fused_po import losses
from fused_po.diagnostics import Examples
from fused_po.ops import stats_loss
from fused_po.study.learners import MAX_TOKENS, pair_examples
from fused_po.study.policy import Language, Sample, sample
from fused_po.study.settings import Settings
from fused_po.study.task import Prompt, paraphrase, reward
from fused_po.trainers.model import token_stats_of

__all__ = ["PASSES", "Evaluation", "pass_at"]

# k of pass@k
PASSES = 8

Pairs = Sequence[tuple[Sample, Sample]]


def pass_at(k: int, right: Sequence[int], drawn: int) -> float:
    """The share of prompts that at least one of k answers solves, without bias from n >= k answers to each (Chen et
    al., arXiv 2107.03374): the mean of 1 - C(n - c, k) / C(n, k) over prompts with c right answers.
    """
    return sum(1.0 - math.comb(drawn - c, k) / math.comb(drawn, k) for c in right) / len(right)


class Evaluation:
    """What is measured of every arm at every checkpoint, with the same draws of prompts and random numbers."""

    def __init__(
        self,
        start: nn.Module,
        language: Language,
        settings: Settings,
        prompts: dict[str, list[Prompt]],
        pairs: dict[str, Pairs],
        seed: int,
    ) -> None:
        self._start, self._language, self._settings, self._seed = start, language, settings, seed
        # as many answers to each prompt; enough prompts for about ``samples`` answers
        self._prompts = {name: some[: max(1, round(settings.samples / PASSES))] for name, some in prompts.items()}
        device = next(start.parameters()).device
        self._pairs = {name: pair_examples(start, language, some, device) for name, some in pairs.items()}
        other = [(self._reworded(right), self._reworded(wrong)) for right, wrong in pairs["held_out"]]
        self._paraphrases = pair_examples(start, language, other, device)

    def __call__(self, model: Any) -> dict[str, float]:
        """All numbers by name; training goes on as if nothing had been drawn."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self._seed)
            model.eval()
            found: dict[str, float] = {}
            for name, prompts in self._prompts.items():
                found |= {f"{metric}/{name}": value for metric, value in self._answers(model, prompts).items()}
            found["reward/gap"] = found["reward/train"] - found["reward/held_out"]
            for name, pairs in self._pairs.items():
                found |= {f"{metric}/{name}": value for metric, value in self._preference(model, pairs).items()}
            return found | self._probes(model)

    def _answers(self, model: Any, prompts: Sequence[Prompt]) -> dict[str, float]:
        samples = sample(model, self._language, [p for p in prompts for _ in range(PASSES)], MAX_TOKENS)
        right = [reward(one.prompt, one.text) for one in samples]
        groups = [int(sum(right[first : first + PASSES])) for first in range(0, len(right), PASSES)]
        batch = self._language.pad(samples, model.device)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        stats = token_stats_of(model, inputs, batch.labels, ("logp", "entropy"))
        before = token_stats_of(self._start, inputs, batch.labels).logp
        assert stats.entropy is not None and stats.logp is not None and before is not None
        return {
            "reward": sum(right) / len(right),
            f"pass@{PASSES}": pass_at(PASSES, groups, PASSES),
            "distinct": len({(one.prompt, one.text) for one in samples}) / len(samples),
            "entropy": stats.entropy[batch.labels != -100].mean().item(),
            "kl": (stats.logp - before).double().sum(1).mean().item(),
        }

    def _preference(self, model: Any, pairs: Examples) -> dict[str, float]:
        """DPO's own loss, implicit reward margin beta h, and the share of pairs that it orders rightly."""
        loss = losses.create("sigmoid", beta=self._settings.beta)
        stats = token_stats_of(model, pairs.inputs, pairs.labels, loss.statistics)
        assert stats.logp is not None
        ratios = stats.logp.double().sum(1) - pairs.side_inputs["ref_logp"]
        chosen, rejected = ratios.chunk(2)
        return {
            "dpo_loss": stats_loss(stats, pairs.labels, loss, **pairs.side_inputs).loss.item(),
            "margin": self._settings.beta * (chosen - rejected).mean().item(),
            # a tie, as at the start, is half right
            "accuracy": ((chosen > rejected).double() + 0.5 * (chosen == rejected)).mean().item(),
        }

    def _probes(self, model: Any) -> dict[str, float]:
        """Drift of log-probs and the mass of the likeliest token, on right and wrong answers and the same reworded."""
        found = {}
        for suffix, pairs in (("", self._pairs["held_out"]), ("/reworded", self._paraphrases)):
            stats = token_stats_of(model, pairs.inputs, pairs.labels, ("logp", "max_logp"))
            assert stats.logp is not None and stats.max_logp is not None
            half = pairs.labels.shape[0] // 2
            for side, rows in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
                keep = pairs.labels[rows] != -100
                drift = stats.logp[rows].double().sum(1) - pairs.side_inputs["ref_logp"][rows]
                found[f"drift/{side}{suffix}"] = drift.mean().item()
                found[f"max_prob/{side}{suffix}"] = stats.max_logp[rows][keep].exp().mean().item()
        return found

    def _reworded(self, one: Sample) -> Sample:
        return self._language.written(one.prompt, paraphrase(one.text))
