"""What a model of a study says to held-out prompts and pairs, beside the start of the study."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_po import losses
from fused_po.ops import stats_loss
from fused_po.ops.checks import IGNORE
from fused_po.stats import Stats
from fused_po.study.real_data import last_words, words_of
from fused_po.study.real_model import Answer, Speaker, answers, autocast
from fused_po.study.real_reward import Judge, Reward, wins
from fused_po.study.real_settings import RealSettings
from fused_po.trainers import whole
from fused_po.trainers.batches import AnswerBatch, answers_of, pad_answers
from fused_po.trainers.model import token_stats_of

__all__ = ["Measure", "columns_of", "interval", "write_outputs"]


@dataclass
class Measure:
    """What a checkpoint is measured on.

    Attributes:
        settings, speaker: of the study.
        start: the model as it is before training, without an adapter; moved to the device while it is asked.
        pairs: name (``train``, ``held_out``) -> rows of ``load_preferences``.
        prompts: held-out rows of the data, which are answered.
        reward, judge: what answers are worth, and how two are compared, if the user says so.
    """

    settings: RealSettings
    speaker: Speaker
    start: Any
    pairs: Mapping[str, Any]
    prompts: Sequence[dict[str, Any]]
    reward: Reward | None
    judge: Judge | None

    def __post_init__(self) -> None:
        self._of_start: dict[str, list[Tensor]] = {}
        self._baseline: dict[int, list[Answer]] = {}

    def __call__(self, model: Any, folder: Path | None, step: int, seed: int, name: str) -> dict[str, float]:
        """The numbers of a model; its answers go into ``answers.jsonl`` and, in AlpacaEval's format, into
        ``model_outputs.json``.

        Args:
            folder: of the run; None: nothing is written.
            name: of the model, to AlpacaEval the generator.
        """
        found: dict[str, float] = {}
        for part in self.pairs:
            found |= self._of_pairs(model, part)
        said = self._ask(model, seed)
        found |= self._of_answers(model, said)
        others = self.baseline(seed)
        rewards, won = self._compared(said, others)
        if rewards is not None:
            found["reward/held_out"] = math.fsum(rewards) / len(rewards)
        if won is not None:
            found["win_rate/held_out"] = math.fsum(won) / len(won)
        if folder is None:
            return found
        lines = [
            {
                "step": step,
                "instruction": last_words(one.prompt),
                "output": one.text,
                "reward": None if rewards is None else rewards[index],
                "win": None if won is None else won[index],
            }
            for index, one in enumerate(said)
        ]
        kept = [line for line in whole.json_lines(folder / "answers.jsonl") if line["step"] != step]
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in [*kept, *lines])
        whole.write_text(folder / "answers.jsonl", text)
        write_outputs(folder, said, name)
        return found

    def baseline(self, seed: int) -> list[Answer]:
        """The start's answers to the held-out prompts."""
        if seed not in self._baseline:
            with _on(self.start, self.settings.device):
                self._baseline[seed] = self._ask(self.start, seed)
        return self._baseline[seed]

    def references(self, rows: Any) -> list[list[float]]:
        """The start's log-probs of both answers of each pair, summed over tokens, in float32 whatever it trains in."""
        found = [one.chunk(2) for one in self._referred(rows, nullcontext())]
        return [[*pair] for chosen, rejected in found for pair in zip(chosen.tolist(), rejected.tolist(), strict=True)]

    def _referred(self, rows: Any, within: AbstractContextManager[Any]) -> list[Tensor]:
        """Of each batch, (2B,)."""
        with _on(self.start, self.settings.device), within:
            return [_summed(self._stats(self.start, batch, ("logp",)), batch) for batch in self._batches(rows)]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.settings.device or "cpu", self.settings.dtype or "float32")

    def _ask(self, model: Any, seed: int) -> list[Answer]:
        with self._autocast():
            return answers(model, self.speaker, self.prompts, seed=seed)

    def _compared(
        self, said: Sequence[Answer], others: Sequence[Answer]
    ) -> tuple[list[float] | None, list[float] | None]:
        """Rewards, and how often each answer wins against the start's."""
        rewards = None if self.reward is None else self._rewards(said)
        if self.judge is not None:
            prompts = [one.prompt for one in said]
            return rewards, self.judge(prompts, [one.said for one in said], [one.said for one in others])
        return rewards, None if rewards is None else wins(rewards, self._rewards(others))

    def _rewards(self, said: Sequence[Answer]) -> list[float]:
        assert self.reward is not None
        prompts, given = [one.prompt for one in said], [one.said for one in said]
        return self.reward(prompts, given, columns_of([one.row for one in said]))

    def _batches(self, rows: Any) -> list[AnswerBatch]:
        """Pairs, chosen answers first, on the device."""
        size = self.settings.micro_batch // 2
        found = []
        for first in range(0, len(rows), size):
            block = [rows[index] for index in range(first, min(first + size, len(rows)))]
            found.append(self._padded(answers_of(block)))
        return found

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> AnswerBatch:
        return pad_answers(rows, self.speaker.tokenizer.pad_token_id).to(torch.device(self.settings.device or "cpu"))

    def _stats(self, model: Any, batch: AnswerBatch, outputs: tuple[str, ...]) -> Stats:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad():
            return token_stats_of(model, inputs, batch.labels, outputs)

    def _of_pairs(self, model: Any, part: str) -> dict[str, float]:
        """DPO's loss, how often the chosen answer gains more than the rejected one, and what becomes of both."""
        loss = losses.create("sigmoid", beta=self.settings.beta)
        names = ("dpo_loss", "accuracy", "margin", "drift/chosen", "drift/rejected")
        sums, peaks, pairs = dict.fromkeys(names, 0.0), {"chosen": [0.0, 0.0], "rejected": [0.0, 0.0]}, 0
        rows = self.pairs[part]
        if part not in self._of_start:
            self._of_start[part] = self._referred(rows, self._autocast())
        for batch, reference in zip(self._batches(rows), self._of_start[part], strict=True):
            with self._autocast():
                stats = self._stats(model, batch, tuple(dict.fromkeys((*loss.statistics, "max_logp"))))
            chosen, rejected = (_summed(stats, batch) - reference).chunk(2)
            count, gap = len(chosen), chosen - rejected
            pairs += count
            sums["dpo_loss"] += count * stats_loss(stats, batch.labels, loss, ref_logp=reference).loss.item()
            sums["accuracy"] += ((gap > 0).double() + 0.5 * (gap == 0).double()).sum().item()
            sums["margin"] += self.settings.beta * gap.sum().item()
            assert stats.max_logp is not None
            for side, drift, rows in (("chosen", chosen, slice(0, count)), ("rejected", rejected, slice(count, None))):
                sums[f"drift/{side}"] += drift.sum().item()
                keep = batch.labels[rows] != IGNORE
                peaks[side][0] += stats.max_logp[rows][keep].double().exp().sum().item()
                peaks[side][1] += keep.sum().item()
        found = {name: value / pairs for name, value in sums.items()}
        if part != "held_out":
            return {f"{name}/{part}": found[name] for name in ("dpo_loss", "accuracy", "margin")}
        # names of the small study
        named = {name if "/" in name else f"{name}/{part}": value for name, value in found.items()}
        return named | {f"max_prob/{side}": total / count for side, (total, count) in peaks.items()}

    def _of_answers(self, model: Any, said: Sequence[Answer]) -> dict[str, float]:
        """Of answers drawn from the model: how far it is from the start, its entropy, and their length."""
        size, kl, entropy, tokens = self.settings.micro_batch, 0.0, 0.0, 0
        batches = [
            self._padded([(one.prompt_ids, one.ids) for one in said[first : first + size]])
            for first in range(0, len(said), size)
        ]
        for batch in batches:
            with self._autocast():
                stats = self._stats(model, batch, ("logp", "entropy"))
            keep = batch.labels != IGNORE
            assert stats.entropy is not None
            kl += _summed(stats, batch).sum().item()
            entropy += stats.entropy[keep].double().sum().item()
            tokens += int(keep.sum())
        with _on(self.start, self.settings.device), self._autocast():
            for batch in batches:
                kl -= _summed(self._stats(self.start, batch, ("logp",)), batch).sum().item()
        return {
            "kl/held_out": kl / len(said),
            "entropy/held_out": entropy / max(1, tokens),
            "length/held_out": tokens / len(said),
        }


def write_outputs(folder: Path, said: Sequence[Answer], name: str) -> None:
    """``model_outputs.json`` in the format of AlpacaEval: a list of instruction, output and generator."""
    outputs = [{"instruction": last_words(one.prompt), "output": words_of(one.said), "generator": name} for one in said]
    text = json.dumps(outputs, ensure_ascii=False, indent=1)
    whole.write_text(folder / "model_outputs.json", f"{text}\n")


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns that all rows have, but the prompt."""
    known = set.intersection(*(set(row) for row in rows)) - {"prompt"}
    return {name: [row[name] for row in rows] for name in rows[0] if name in known}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval (BCa) of the mean of what prompts gave; NaN where it is not defined."""
    from scipy.stats import bootstrap

    if len(values) < 2 or len(set(values)) < 2:
        return math.nan, math.nan
    found = bootstrap((values,), _mean, n_resamples=9999, rng=0, vectorized=True).confidence_interval
    return float(found.low), float(found.high)


def _mean(values: Any, axis: int) -> Any:
    return values.mean(axis=axis)


def _summed(stats: Stats, batch: AnswerBatch) -> Tensor:
    """Log-probs of the answers, (B,), in float64."""
    assert stats.logp is not None
    return torch.where(batch.labels != IGNORE, stats.logp, 0.0).double().sum(1)


class _on:
    """A context in which a model is on a device, and behind it on the CPU again."""

    def __init__(self, model: Any, device: str | None) -> None:
        self._model, self._device = model, device or "cpu"

    def __enter__(self) -> None:
        self._model.to(self._device)

    def __exit__(self, *error: object) -> None:
        self._model.to("cpu")
