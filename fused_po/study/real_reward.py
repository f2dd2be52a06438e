"""What answers are worth: a function of the user's, a reward model, or a judge that compares two answers."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_po.study.real_data import words_of

__all__ = ["Judge", "Reward", "load_judge", "load_reward", "wins"]

# rows that a reward model reads at once
ROWS = 8

Reward = Callable[[Sequence[Any], Sequence[Any], Mapping[str, Sequence[Any]]], list[float]]
Judge = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], list[float]]


def load_reward(name: str, device: str) -> Reward:
    """A reward of prompts, answers and the other columns of their rows: one number for each answer.

    Args:
        name: ``module:function``, called as TRL calls its reward functions, ``function(prompts=, completions=,
            **columns)``, with the prompts and answers as they stand in the data (strings, or lists of messages); or the
            folder or hub id of a sequence classification model with one label, a reward model.
        device: where a reward model goes.

    Raises:
        ValueError: not found, or no reward model.
    """
    if _is_function(name):
        function = _function(name, "--reward")
        return lambda prompts, answers, columns: _numbers(
            name, function(prompts=list(prompts), completions=list(answers), **columns), len(answers)
        )
    return _reward_model(name, device)


def load_judge(name: str) -> Judge:
    """A judge of two answers to each prompt: how likely the first is the better one, in [0, 1].

    Args:
        name: ``module:function``, called as ``function(prompts, answers, others)``.

    Raises:
        ValueError: not found.
    """
    if not _is_function(name):
        raise ValueError(f"--judge {name}: MODULE:FUNCTION is wanted")
    function = _function(name, "--judge")

    def judge(prompts: Sequence[Any], answers: Sequence[Any], others: Sequence[Any]) -> list[float]:
        found = _numbers(name, function(list(prompts), list(answers), list(others)), len(answers))
        if not all(0.0 <= one <= 1.0 for one in found):
            raise ValueError(f"{name} must return how likely the first answer is better, in [0, 1]: got {min(found)}")
        return found

    return judge


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where our reward is the larger one, 0.5 where both are equal, else 0."""
    return [0.5 if one == other else float(one > other) for one, other in zip(ours, theirs, strict=True)]


def _is_function(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _function(name: str, flag: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    # the module is one of the folder that the command runs in
    sys.path[:0] = [""] if "" not in sys.path else []
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{flag} {name}: not found ({error})") from None
    if not callable(found):
        raise ValueError(f"{flag} {name}: is no function")
    return found


def _numbers(name: str, values: Any, count: int) -> list[float]:
    try:
        found = [float(one) for one in values]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must return a list of numbers: got {values!r:.80}") from None
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must return {count} finite numbers, one for each answer: got {found!r:.80}")
    return found


def _reward_model(name: str, device: str) -> Reward:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--reward {name}: no such folder, and no MODULE:FUNCTION")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--reward {name}: no reward model ({str(error).splitlines()[0]})") from None
    if model.config.num_labels != 1:
        raise ValueError(f"--reward {name}: a reward model has one label, this one {model.config.num_labels}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    def text(prompt: Any, answer: Any) -> str:
        if isinstance(prompt, str) or not tokenizer.chat_template:
            return words_of(prompt) + words_of(answer)
        return str(tokenizer.apply_chat_template(prompt + answer, tokenize=False))

    @torch.no_grad()
    def reward(prompts: Sequence[Any], answers: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[float]:
        texts, found = [text(*one) for one in zip(prompts, answers, strict=True)], []
        for first in range(0, len(texts), ROWS):
            given = tokenizer(texts[first : first + ROWS], return_tensors="pt", padding=True, truncation=True).to(
                device
            )
            given.pop("token_type_ids", None)
            found += model(**given).logits[:, 0].float().tolist()
        return _numbers(name, found, len(texts))

    return reward
