"""The small study's own words: what was run, for its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

import fused_po
from fused_po.study.policy import new_model, tiny_tokenizer
from fused_po.study.report import About
from fused_po.study.run import HELD_OUT
from fused_po.study.settings import TUNED, Settings
from fused_po.study.task import all_prompts

__all__ = ["about"]


def about(
    settings: Settings,
    seeds: Sequence[int],
    command: str,
    seconds: float,
    smoke: bool = False,
    first_look: bool = False,
) -> About:
    """What a small study is made of; ``first_look``: of seeds that are done while others still run."""
    train, held_out = all_prompts(settings.largest, HELD_OUT, 0)
    model = new_model(tiny_tokenizer(), settings.hidden_size, settings.layers, 0)
    size = sum(one.numel() for one in model.parameters())
    name = settings.policy_loss.upper()
    policy = (
        f"clip {settings.epsilon}, a value model of its own, GAE per token"
        if settings.policy_loss == "ppo"
        else f"clip {settings.epsilon}, group-relative advantages over {settings.generations} answers"
    )
    notes = []
    if first_look:
        notes.append("**A first look**: other seeds are still running.")
    if settings.policy_loss != "ppo":
        notes.append(f"Where claims and plots say PPO, it is {name} here.")
    if not smoke and (old := [seed for seed in seeds if seed < TUNED]):
        notes.append(f"**Seeds below {TUNED} chose settings and schedules**: those of {_ranges(old)} test nothing.")
    lines = [
        f"**Model**: a random Llama of {settings.layers} layers, hidden size {settings.hidden_size}, one token per "
        f"character, {size:,} parameters, on {settings.device} in float32. What it supports is possible, not general.",
        f"**Data**: `37,4=` asks for a sum equal to 37 in which the digit 4 occurs (`14+23`); reward 1 or 0. "
        f"{len(train)} prompts to train on, {len(held_out)} held out.",
        f"**Start**: supervised for {settings.sft_steps} updates on demonstrations of which {settings.noise:.0%} have "
        "wrong sums, the same for all arms of a seed.",
        f"**DPO**: {settings.pairs} pairs of a right and a wrong answer of the start, beta {settings.beta}. "
        f"**{name}**: {policy}, {settings.epochs} epochs of {settings.minibatches} minibatches a rollout, no KL "
        f"penalty but in the arm of that name. {settings.steps} updates each.",
        f"**D**: all pairs for DPO, {settings.draws} draws of {settings.samples} fresh answers for {name}, whose ratio "
        f"to the sampling policy is 1 and which the clip leaves alone, at {settings.checkpoints} checkpoints.",
        f"**D'**: answers of a run's own final model to every training prompt, sampled {settings.final_draws} times, "
        "and greedy. What is said of G is the mean of both kinds; gradients are exact.",
        f"**{len(seeds)} seeds** ({_ranges(seeds)}), which share nothing.",
        f"**Versions**: fused_po {fused_po.__version__}, torch {torch.__version__}.",
    ]
    return About("What DPO and PPO do to a small model", lines, asdict(settings), command, seconds, smoke, notes)


def _ranges(seeds: Sequence[int]) -> str:
    """``3, 5 to 9``."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
