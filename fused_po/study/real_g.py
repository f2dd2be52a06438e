"""G over the checkpoints of a run on a pretrained model.

D are its pairs, or the checkpoint's own rollouts; D' are answers of the final model.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_po import advantages
from fused_po.diagnostics import Examples, gradient_alignment
from fused_po.diagnostics.parts import ALL_PARTS
from fused_po.study.real_measure import columns_of
from fused_po.study.real_model import Answer, Speaker, answers, autocast, examples_of, load
from fused_po.study.real_reward import Reward
from fused_po.study.real_settings import RealSettings
from fused_po.study.real_train import loss_of
from fused_po.trainers.batches import answers_of

__all__ = ["NUMBERS", "g_of_run"]

SIDES = ("positive", "negative")
# what a checkpoint is measured by; NaN where there is no gradient
NUMBERS = ("G", "cosine", *(f"cosine/{side}" for side in SIDES), *(f"G/{part}" for part in ALL_PARTS))


def g_of_run(
    settings: RealSettings,
    seed: int,
    method: str,
    models: Mapping[int, Path | None],
    *,
    known: set[int],
    speaker: Speaker,
    pairs: Any,
    references: Callable[[Any], list[list[float]]],
    prompts: Sequence[dict[str, Any]],
    reward: Reward | None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """G of each checkpoint and of each of its parts, as they are measured.

    Args:
        models: update -> checkpoint, None for the start.
        known: updates that are measured already.
        pairs: rows that DPO learns from.
        references: the start's log-probs of both answers of each pair, a number each.
        prompts: rows whose prompts the final model answers, and a policy.
    """
    wanted = [step for step in models if step not in known]
    if not wanted:
        return
    device, pad = settings.device or "cpu", speaker.tokenizer.pad_token_id
    draw = random.Random(seed)
    asked = [draw.choice(prompts) for _ in range(settings.samples)]

    def of(step: int) -> Any:
        return load(settings.model, models[step], settings.lora, seed, speaker.tokenizer).to(device).eval()

    final = of(max(models))
    with autocast(device, settings.dtype or "float32"):
        # not by the random numbers of rollouts: at the last model the two would share answers
        said = answers(final, speaker, asked, sampled=settings.final == "sampled", seed=seed + 1)
    del final
    target = [_examples(part, pad).to(device) for part in _cut(said, settings)]
    loss = loss_of(method, settings)
    fixed = None if method != "dpo" else _pair_batches(settings, seed, pairs, references, pad)
    for step in wanted:
        gc.collect()
        model = of(step)
        given = fixed if fixed is not None else _rollouts(model, settings, seed, speaker, prompts, reward)
        if given:
            found = gradient_alignment(model, given, loss, target, method=settings.estimator, cosine=True)
            numbers = {"G": found["whole"], "cosine": found.cosine()}
            numbers |= {f"cosine/{side}": found.cosine(side) for side in SIDES}
            numbers |= {f"G/{part}": found[part] for part in found.values}
            yield step, numbers | ({} if found.error is None else {"G/error": found.error})
        else:
            # no advantage, no gradient
            yield step, dict.fromkeys(NUMBERS, math.nan)
        del model


def _pair_batches(
    settings: RealSettings, seed: int, pairs: Any, references: Callable[[Any], list[list[float]]], pad: int
) -> list[Examples]:
    """D of DPO: some of its pairs, the same at every checkpoint."""
    count = min(settings.samples, len(pairs))
    chosen = pairs.select(sorted(random.Random(seed).sample(range(len(pairs)), count)))
    found, size = references(chosen), settings.micro_batch // 2
    batches = []
    for first in range(0, count, size):
        rows = [chosen[index] for index in range(first, min(first + size, count))]
        numbers = [found[first + index][side] for side in (0, 1) for index in range(len(rows))]
        side_inputs = {"ref_logp": torch.tensor(numbers, dtype=torch.float64)}
        batches.append(examples_of(answers_of(rows), pad, side_inputs).to(settings.device or "cpu"))
    return batches


def _rollouts(
    model: Any,
    settings: RealSettings,
    seed: int,
    speaker: Speaker,
    prompts: Sequence[dict[str, Any]],
    reward: Reward | None,
) -> list[Examples]:
    """D of a policy: answers of the checkpoint with their advantages; before an update the ratio is 1. Empty where all
    answers to each prompt are worth the same.
    """
    assert reward is not None
    device, generations = settings.device or "cpu", settings.generations
    draw = random.Random(seed)
    asked = [
        row for row in draw.choices(prompts, k=max(1, settings.samples // generations)) for _ in range(generations)
    ]
    with autocast(device, settings.dtype or "float32"):
        said = answers(model, speaker, asked, seed=seed)
    worth = reward([a.prompt for a in said], [a.said for a in said], columns_of([a.row for a in said]))
    advantage = advantages.group_relative(torch.tensor(worth), num_generations=generations)
    if not bool((advantage != 0).any()):
        return []
    pad, parts = speaker.tokenizer.pad_token_id, zip(_cut(said, settings), _cut(advantage, settings), strict=True)
    return [_examples(part, pad, {"advantage": own}).to(device) for part, own in parts]


def _examples(said: Sequence[Answer], pad: int, side_inputs: Mapping[str, Any] | None = None) -> Examples:
    return examples_of([(one.prompt_ids, one.ids) for one in said], pad, side_inputs)


def _cut(said: Any, settings: RealSettings) -> list[Any]:
    return [said[first : first + settings.micro_batch] for first in range(0, len(said), settings.micro_batch)]
