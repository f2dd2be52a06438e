"""The documented formulas of losses on pairs and on single answers, in arithmetic of any precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpmath import mp, mpf

from tests.fuzz.answers import EXPONENT, HUGE, Answer, Call, Token, difference, weighted
from tests.fuzz.dual import D, const, exp, expm1, log, logsigmoid, relu, sigmoid, total

__all__ = ["FORMULAS"]

Formula = Callable[[Any, Call], list[D]]


def smoothed(z: D, q: float = 0.0) -> D:
    """-(1 - q) log sigmoid(z) - q log sigmoid(-z)."""
    return -logsigmoid(z) * (1 - mpf(q)) - (logsigmoid(-z) * q if q else D(mpf(0)))


def tail_weights(loss: Any, call: Call) -> list[Callable[[int], float]]:
    """LD-DPO: the weight of the k-th token of each answer."""
    if loss.ld_alpha is None:
        return [lambda k: 1.0 for _ in call.answers]
    shared = [min(len(a.tokens), len(b.tokens)) for a, b in call.pairs] * 2
    return [lambda k, s=s: loss.ld_alpha if k >= s else 1.0 for s in shared]


def summed(loss: Any, call: Call, f: Callable[[Token], D]) -> list[D]:
    """Of each answer, with the weights of LD-DPO."""
    return [
        total(weighted(f(token), weight(k)) for k, token in enumerate(answer.tokens))
        for answer, weight in zip(call.answers, tail_weights(loss, call), strict=True)
    ]


def log_ratios(loss: Any, call: Call) -> list[D]:
    """u of each answer."""
    given = [const(a.given["ref_logp"]) if "ref_logp" in a.given else None for a in call.answers]
    if None in given:
        given = summed(loss, call, lambda t: const(t.given["ref_logp"]))
    return [difference(a, b) for a, b in zip(summed(loss, call, lambda t: t.logp), given, strict=True)]


def slope(loss: Any, x: D) -> D:
    """The score that a divergence makes of a log-ratio."""
    kind, power = loss.f_divergence_type, mpf(loss.f_alpha_divergence_coef) - 1
    if kind == "forward_kl":
        return -expm1((-x).clamp(high=EXPONENT))
    if kind == "js_divergence":
        return logsigmoid(x) + mp.log(2)
    if kind == "alpha_divergence" and abs(power) >= 1e-6:
        return expm1((x * power).clamp(high=80.0)) / power
    return x


def likelihood(loss: Any, call: Call) -> list[mpf]:
    """WPO's weight of each pair."""
    if not loss.use_weighting:
        return [mpf(1)] * len(call.pairs)
    each = [exp(a.mean(lambda t: t.logp - t.lssq)).v for a in call.answers]
    half = len(call.pairs)
    return [a * b for a, b in zip(each[:half], each[half:], strict=True)]


def margins(of: Callable[[Any, D], D], by_length: bool = False) -> Formula:
    """Losses of the difference of two scores."""

    def formula(loss: Any, call: Call) -> list[D]:
        scores = [slope(loss, u) for u in log_ratios(loss, call)]
        if by_length:
            scores = [s / a.size for s, a in zip(scores, call.answers, strict=True)]
        half = len(call.pairs)
        found = [of(loss, a - b) for a, b in zip(scores[:half], scores[half:], strict=True)]
        return call.over_pairs([v * w for v, w in zip(found, likelihood(loss, call), strict=True)])

    return formula


def sides(of: Callable[[Any, D, D], D]) -> Formula:
    """Losses of both log-ratios."""

    def formula(loss: Any, call: Call) -> list[D]:
        scores, half = log_ratios(loss, call), len(call.pairs)
        found = [of(loss, u, v) for u, v in zip(scores[:half], scores[half:], strict=True)]
        return call.over_pairs([v * w for v, w in zip(found, likelihood(loss, call), strict=True)])

    return formula


def robust(loss: Any, h: D) -> D:
    q, z = mpf(loss.label_smoothing), h * loss.beta
    return (-logsigmoid(z) * (1 - q) + logsigmoid(-z) * q) / (1 - 2 * q)


def exo(loss: Any, h: D) -> D:
    q, z = mpf(loss.label_smoothing), h * loss.beta
    return sigmoid(z) * (logsigmoid(z) - mp.log1p(-q)) + sigmoid(-z) * (logsigmoid(-z) - mp.log(q))


def discopop(loss: Any, h: D) -> D:
    z = h * loss.beta
    gate = z / loss.discopop_tau
    return -sigmoid(-gate) * logsigmoid(z) + exp((logsigmoid(gate) - z).clamp(high=EXPONENT))


def aims(loss: Any, u: D, v: D) -> D:
    aim = 1 / (2 * mpf(loss.beta))
    return (u - aim).square() + (v + aim).square()


def shift(loss: Any, call: Call, rewards: list[D]) -> mpf:
    """What BCO compares rewards with."""
    found = call.scalars.get("shift", mpf(0)) * loss.shift_weight
    held = [r.v for r, a in zip(rewards, call.answers, strict=True) if a.tokens]
    return found + (1 - mpf(loss.shift_weight)) * mp.fsum(held) / max(1, len(held)) if loss.shift_weight < 1 else found


def bco_pair(loss: Any, call: Call) -> list[D]:
    rewards = [u * loss.beta for u in log_ratios(loss, call)]
    origin, half = shift(loss, call, rewards), len(call.pairs)
    found = [
        -logsigmoid(a - origin) - logsigmoid(-(b - origin)) for a, b in zip(rewards[:half], rewards[half:], strict=True)
    ]
    return call.over_pairs([v * w for v, w in zip(found, likelihood(loss, call), strict=True)])


def members(call: Call) -> list[int]:
    return [i for i, (a, b) in enumerate(call.pairs) if a.tokens or b.tokens]


def ranked(loss: Any, call: Call, upper: list[D], lower: list[D]) -> list[D]:
    held = members(call)
    sides = [sorted((side[i] for i in held), key=lambda x: x.v) for side in (upper, lower)]
    return [
        smoothed(difference(a, b) * loss.beta, loss.label_smoothing) / (call.num_sequences / 2)
        for a, b in zip(*sides, strict=True)
    ]


def aot(loss: Any, call: Call) -> list[D]:
    logps, ratios, half = summed(loss, call, lambda t: t.logp), log_ratios(loss, call), len(call.pairs)
    reference = [difference(a.detach(), u.detach()) for a, u in zip(logps, ratios, strict=True)]
    policy = [difference(logps[i], logps[half + i]) for i in range(half)]
    return ranked(loss, call, policy, [difference(reference[i], reference[half + i]) for i in range(half)])


def aot_unpaired(loss: Any, call: Call) -> list[D]:
    scores, half = log_ratios(loss, call), len(call.pairs)
    return ranked(loss, call, scores[:half], scores[half:])


def beta_dpo(loss: Any, call: Call) -> list[D]:
    scores, half, held = log_ratios(loss, call), len(call.pairs), members(call)
    margin = [difference(scores[i], scores[half + i]) for i in range(half)]
    usual = call.scalars.get("shift", mpf(0))
    reward = [m.v * loss.beta for m in margin]
    count = mp.ceil(len(held) * mpf(loss.kept) - mpf("1e-9"))
    kept = sorted(held, key=lambda i: abs(reward[i] - usual))[: int(count)]
    mean = mp.fsum(reward[i] for i in kept) / max(1, len(kept)) - usual
    beta = max(loss.beta * (1 + loss.beta_alpha * mean), mpf(loss.beta_min))
    weights, share = likelihood(loss, call), mpf(len(held)) / max(1, len(kept))
    return [-logsigmoid(margin[i] * beta) * weights[i] * share / (call.num_sequences / 2) for i in kept]


def cpo(loss: Any, call: Call) -> list[D]:
    by_length = loss.loss_type in ("ipo", "simpo")
    scores = []
    for answer in call.answers:
        x = (answer.mean(lambda t: t.logp) if by_length else answer.logp()).clamp(-HUGE, HUGE)
        scores.append(-expm1((x * -loss.alpha).clamp(high=EXPONENT)) / loss.alpha if loss.alpha else x)
    half, found = len(call.pairs), []
    for a, b in zip(scores[:half], scores[half:], strict=True):
        m = a - b
        if loss.loss_type == "hinge":
            found.append(relu(1 - m * loss.beta))
        elif loss.loss_type == "ipo":
            found.append((m - 1 / (2 * mpf(loss.beta))).square())
        else:
            gamma = loss.simpo_gamma if loss.loss_type == "simpo" else 0.0
            found.append(smoothed(m * loss.beta - gamma, loss.label_smoothing))
    nll = [v * loss.cpo_alpha for v in call.chosen_nll()] if loss.cpo_alpha else []
    return [*call.over_pairs(found), *nll]


def odds(answer: Answer) -> D:
    own = [t for t in answer.tokens if not t.get("nll_mask", 0)]
    x = (total(t.logp for t in own) / max(1, len(own))).clamp(-HUGE, -1e-37)
    return x - log(-expm1(x))


def orpo(loss: Any, call: Call) -> list[D]:
    found = [-logsigmoid(odds(a) - odds(b)) * loss.beta for a, b in call.pairs]
    return [*call.chosen_nll(), *call.over_pairs(found)]


def unpaired(of: Callable[[D], D], origin: Callable[[Any, Call, list[D]], mpf]) -> Formula:
    def formula(loss: Any, call: Call) -> list[D]:
        rewards = [difference(a.logp(), a.summed("ref_logp")) * loss.beta for a in call.answers]
        start, found = origin(loss, call, rewards), []
        for answer, reward in zip(call.answers, rewards, strict=True):
            up = answer.given["desirable"]
            margin = (reward - start) * (1 if up else -1)
            weight = loss.desirable_weight if up else loss.undesirable_weight
            if answer.tokens:
                found.append(of(margin) * weight / call.num_sequences)
        return found

    return formula


def sft(loss: Any, call: Call) -> list[D]:
    if loss.paired:
        return call.chosen_nll()
    return [weighted(-t.logp, t.get("row_weight", 1)) / call.num_items for t in call.tokens]


FORMULAS: dict[str, Formula] = {
    "sigmoid": margins(lambda loss, h: -logsigmoid(h * loss.beta)),
    "sigmoid_norm": margins(lambda loss, h: -logsigmoid(h * loss.beta), by_length=True),
    "conservative": margins(lambda loss, h: smoothed(h * loss.beta, loss.label_smoothing)),
    "robust": margins(robust),
    "hinge": margins(lambda loss, h: relu(1 - h * loss.beta)),
    "ipo": margins(lambda loss, h: (h - 1 / (2 * mpf(loss.beta))).square(), by_length=True),
    "exo_pair": margins(exo),
    "discopop": margins(discopop),
    "nca_pair": sides(
        lambda loss, u, v: (
            -logsigmoid(u * loss.beta) - (logsigmoid(-(u * loss.beta)) + logsigmoid(-(v * loss.beta))) * mpf("0.5")
        )
    ),
    "sppo_hard": sides(aims),
    "cal_dpo": sides(lambda loss, u, v: -logsigmoid(u - v) + aims(loss, u, v) * mpf("0.5")),
    "apo_zero": sides(lambda loss, u, v: sigmoid(-(u * loss.beta)) + sigmoid(v * loss.beta)),
    "apo_down": sides(lambda loss, u, v: sigmoid(u * loss.beta) + sigmoid(-((u - v) * loss.beta))),
    "dpop": sides(lambda loss, u, v: -logsigmoid((u - v - relu(-u) * loss.dpop_lambda) * loss.beta)),
    "bco_pair": bco_pair,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "beta_dpo": beta_dpo,
    "cpo": cpo,
    "simpo": cpo,
    "alphapo": cpo,
    "orpo": orpo,
    "kto": unpaired(lambda m: sigmoid(-m), lambda loss, call, _: call.scalars["kl"] * loss.beta),
    "apo_zero_unpaired": unpaired(lambda m: sigmoid(-m), lambda loss, call, _: mpf(0)),
    "bco": unpaired(lambda m: -logsigmoid(m), shift),
    "sft": sft,
}
