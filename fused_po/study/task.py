"""The task: write a sum that equals a number and has a digit in it. Many answers are right, each can be checked."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALPHABET", "Prompt", "all_prompts", "demonstration", "paraphrase", "reward"]

ALPHABET = "0123456789+,="
_SUM = re.compile(r"[1-9]\d*(\+[1-9]\d*)+")


@dataclass(frozen=True)
class Prompt:
    """Asks for a sum equal to ``total`` with ``digit`` in it: ``"37,4="``, to which ``14+23`` is a right answer."""

    total: int
    digit: int

    @property
    def text(self) -> str:
        return f"{self.total},{self.digit}="


def all_prompts(largest: int, held_out: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts in random order: every total from 10 to ``largest`` with every digit that occurs
    in a right answer.
    """
    prompts = [Prompt(total, digit) for total in range(10, largest + 1) for digit in range(1, 10) if digit < total]
    random.Random(seed).shuffle(prompts)
    count = round(held_out * len(prompts))
    return prompts[count:], prompts[:count]


def reward(prompt: Prompt, answer: str) -> float:
    """1 for a right answer, else 0."""
    if not _SUM.fullmatch(answer) or str(prompt.digit) not in answer:
        return 0.0
    return float(sum(map(int, answer.split("+"))) == prompt.total)


def paraphrase(answer: str) -> str:
    """The same answer said otherwise: its terms the other way around."""
    return "+".join(reversed(answer.split("+")))


def demonstration(prompt: Prompt, noise: float, draw: random.Random) -> str:
    """An answer to learn from; with probability ``noise`` its sum is off by up to 9."""
    total = prompt.total
    if draw.random() < noise:
        total = max(2, total + draw.choice([-1, 1]) * draw.randint(1, 9))
    candidates = _with_digit(total, prompt.digit)
    first = draw.choice(candidates) if candidates else draw.randint(1, total - 1)
    terms = [first, total - first] if first < total else [total]
    # some sums of three terms
    if draw.random() < 0.3:
        where = draw.randrange(len(terms))
        if terms[where] > 1 and str(prompt.digit) not in str(terms[where]):
            part = draw.randint(1, terms[where] - 1)
            terms[where : where + 1] = [part, terms[where] - part]
    draw.shuffle(terms)
    return "+".join(map(str, terms))


def _with_digit(total: int, digit: int) -> Sequence[int]:
    return [first for first in range(1, total) if str(digit) in str(first)]
