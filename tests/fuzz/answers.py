"""A call as formulas see it: answers as lists of tokens, and what the documentation says of sums, means and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpmath import mp, mpf

from tests.fuzz.dual import D, const, exp, total

__all__ = ["EXPONENT", "HUGE", "RATIO", "Answer", "Call", "Token", "difference", "ratio", "weighted"]

# an infinite log-ratio, the bound of the log of a ratio, and the log of the largest float32
HUGE, RATIO, EXPONENT = 1e15, 80.0, 88.722839052068


@dataclass
class Token:
    """A loss token: its statistics, and its side inputs by name."""

    logp: D
    entropy: D
    lssq: mpf
    given: dict[str, mpf]

    def get(self, name: str, default: float) -> mpf:
        return self.given.get(name, mpf(default))

    @property
    def advantage(self) -> mpf:
        return self.given["advantage"]

    @property
    def old(self) -> D:
        return const(self.given["old_logp"]) if "old_logp" in self.given else self.logp.detach()

    @property
    def drift(self) -> D:
        """log pi - log pi_old."""
        return difference(self.logp, self.old)


@dataclass
class Answer:
    """The loss tokens of a sequence, and its side inputs by name."""

    tokens: list[Token]
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """As a divisor."""
        return max(1, len(self.tokens))

    def sum(self, f: Callable[[Token], D]) -> D:
        return total(f(token) for token in self.tokens)

    def mean(self, f: Callable[[Token], D]) -> D:
        return self.sum(f) / self.size

    def logp(self) -> D:
        return self.sum(lambda t: t.logp)

    def summed(self, name: str) -> D:
        """A side input that is given as a sum, or per token."""
        return const(self.given[name]) if name in self.given else self.sum(lambda t: const(t.given[name]))


@dataclass
class Call:
    """All answers, those of pairs chosen first, with what is divided by."""

    answers: list[Answer]
    scalars: dict[str, mpf]
    num_items: mpf
    num_sequences: mpf
    num_chosen: mpf
    num_call: mpf

    @property
    def tokens(self) -> list[Token]:
        return [token for answer in self.answers for token in answer.tokens]

    @property
    def pairs(self) -> list[tuple[Answer, Answer]]:
        half = len(self.answers) // 2
        return list(zip(self.answers[:half], self.answers[half:], strict=True))

    def over_pairs(self, values: list[D]) -> list[D]:
        """Contributions of pairs that hold a token."""
        pairs = zip(self.pairs, values, strict=True)
        return [v / (self.num_sequences / 2) for (a, b), v in pairs if a.tokens or b.tokens]

    def chosen_nll(self) -> list[D]:
        half = len(self.answers) // 2
        return [-t.logp / self.num_chosen for answer in self.answers[:half] for t in answer.tokens]


def difference(a: D | float, b: D | float) -> D:
    """Of log-probs: at most 1e15 either way and constant there, 0 between the same infinities."""
    a, b = const(a), const(b)
    return D(mpf(0)) if a.v == b.v and mp.isinf(a.v) else (a - b).clamp(-HUGE, HUGE)


def weighted(value: D, weight: float) -> D:
    """A weight of 0 leaves nothing, not even of an infinity."""
    return value * weight if weight else D(mpf(0))


def ratio(drift: D) -> D:
    """e^drift, constant beyond e^+-80."""
    return exp(drift.clamp(-RATIO, RATIO))
