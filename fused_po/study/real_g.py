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
from fused_po.study.real_model import Speaker, answers, autocast, examples_of, load
from fused_po.study.real_reward import Reward
from fused_po.study.real_settings import RealSettings
from fused_po.study.real_train import loss_of

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
    target = _batches(
        [examples_of([(a.prompt_ids, a.ids) for a in part], pad) for part in _cut(said, settings)], device
    )
    loss = loss_of(method, settings)
    fixed = None if method != "dpo" else _batches(_pair_batches(settings, seed, pairs, references, pad), device)
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
        split = [
            (row["ids"][side][: row["starts"][side]], row["ids"][side][row["starts"][side] :])
            for side in (0, 1)
            for row in rows
        ]
        numbers = [found[first + index][side] for side in (0, 1) for index in range(len(rows))]
        batches.append(examples_of(split, pad, {"ref_logp": torch.tensor(numbers, dtype=torch.float64)}))
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
    pad, size, batches = speaker.tokenizer.pad_token_id, settings.micro_batch, []
    for first in range(0, len(said), size):
        rows = [(a.prompt_ids, a.ids) for a in said[first : first + size]]
        batches.append(examples_of(rows, pad, {"advantage": advantage[first : first + size]}))
    return _batches(batches, device) if bool((advantage != 0).any()) else []


def _cut(said: Sequence[Any], settings: RealSettings) -> list[Sequence[Any]]:
    return [said[first : first + settings.micro_batch] for first in range(0, len(said), settings.micro_batch)]


def _batches(batches: Sequence[Examples], device: str) -> list[Examples]:
    return [
        Examples(
            {name: value.to(device) for name, value in one.inputs.items()},
            one.labels.to(device),
            {name: value.to(device) for name, value in one.side_inputs.items()},
        )
        for one in batches
    ]
