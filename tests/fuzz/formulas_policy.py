"""The documented formulas of losses on tokens with advantages, in arithmetic of any precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mpmath import mp, mpf

from tests.fuzz.answers import HUGE, RATIO, Answer, Call, Token, difference, ratio, weighted
from tests.fuzz.dual import D, const, exp, expm1, minimum, sigmoid, total

__all__ = ["FORMULAS"]

Formula = Callable[[Any, Call], list[D]]
# the surrogate of each token of an answer
Surrogate = Callable[[Any, Call, Answer], list[D]]


def scale(loss: Any, call: Call, answer: Answer) -> mpf:
    """What a token's share of the loss is divided by."""
    mode = {
        **dict.fromkeys(("grpo", "sapo", "gspo", "gspo_token", "gmpo", "rloo"), "seq-mean-token-mean"),
        **dict.fromkeys(("dapo", "cispo", "vespo"), "token-mean"),
        **dict.fromkeys(("luspo", "dr_grpo"), "seq-mean-token-sum"),
        "bnpo": "call",
    }.get(loss.name) or loss.loss_agg_mode
    longest = mpf(loss.max_completion_length) if loss.name == "dr_grpo" else mpf(1)
    return {
        "token-mean": call.num_items,
        "call": call.num_call,
        "seq-mean-token-mean": call.num_sequences * answer.size,
        "seq-mean-token-sum": call.num_sequences * longest,
    }[mode]


def high_entropy(loss: Any, call: Call) -> set[int]:
    """Tokens (by identity) that ``top_entropy_quantile`` keeps."""
    if loss.top_entropy_quantile >= 1.0:
        return {id(t) for t in call.tokens}
    ordered = sorted(t.entropy.v for t in call.tokens)
    if not ordered:
        return set()
    rank = (len(ordered) - 1) * (1.0 - loss.top_entropy_quantile)
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    bound = low + (high - low) * (rank - math.floor(rank))
    return {id(t) for t in call.tokens if t.entropy.v >= bound}


def on_policy(loss: Any, answer: Answer, token: Token) -> bool:
    if loss.off_policy_mask_threshold is None or token.advantage >= 0:
        return True
    drifts = answer.mean(lambda t: difference(t.given.get("sampling_logp", t.old), t.logp.detach()))
    return drifts.v <= loss.off_policy_mask_threshold


def penalty(loss: Any, token: Token) -> D:
    """KL to the reference."""
    x = difference(token.given["ref_logp"], token.logp)
    if loss.kl_estimator == "k1":
        return -x
    if loss.kl_estimator == "k2":
        return x.square() * mpf("0.5")
    x = x.clamp(high=RATIO)
    return expm1(x) - x


def kl(loss: Any, answer: Answer, token: Token) -> D:
    if not getattr(loss, "use_bias_correction_kl", False):
        return penalty(loss, token)
    by_token = loss.importance_sampling_level == "token"
    drift = token.drift if by_token else answer.mean(lambda t: t.drift)
    if drift.v > RATIO:
        return D(mpf(0))
    if not by_token and loss.name != "gspo_token":
        return penalty(loss, token) * exp(drift)
    # r k3 as it is documented, without an exponential of x in its slope; r of gspo_token is that of the sequence
    base = token.logp.detach() if loss.name == "gspo_token" else token.old
    shared = exp(drift).v if loss.name == "gspo_token" else mpf(1)
    x, own = difference(token.given["ref_logp"], token.logp), difference(token.logp, base)
    if abs(x.v) >= HUGE:
        return D(mpf(0))
    if loss.kl_estimator != "k3":
        return (-x if loss.kl_estimator == "k1" else x.square() * mpf("0.5")) * exp(own) * shared
    start = difference(token.given["ref_logp"], base).clamp(high=RATIO)
    return (const(exp(start).v) - exp(own) * (x + 1)) * shared


def policy(surrogate: Surrogate) -> Formula:
    """Surrogate, masks and weights, then KL and entropy."""

    def formula(loss: Any, call: Call) -> list[D]:
        kept, found = high_entropy(loss, call), []
        names = ("row_weight",) if loss.name == "vespo" else ("importance_weight", "row_weight")
        for answer in call.answers:
            values = surrogate(loss, call, answer)
            for token, value in zip(answer.tokens, values, strict=True):
                inside = loss.name == "gmpo" or id(token) in kept
                if not (inside and on_policy(loss, answer, token)):
                    value = D(mpf(0))
                for name in names:
                    value = weighted(value, token.get(name, 1))
                found.append(value / scale(loss, call, answer))
                if loss.beta:
                    found.append(kl(loss, answer, token) * loss.beta / scale(loss, call, answer))
                if loss.entropy_coef and id(token) in kept:
                    count = call.num_call if loss.name == "bnpo" else call.num_items
                    share = mpf(len(call.tokens)) / max(1, len(kept))
                    found.append(token.entropy * -loss.entropy_coef * share / count)
        return found

    return formula


def clipped(r: D, a: mpf, loss: Any, ceiling: float = mp.inf) -> D:
    upper = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    return -minimum(r.clamp(high=ceiling) * a, r.clamp(1.0 - loss.epsilon, 1.0 + upper) * a)


def ppo(loss: Any, call: Call, answer: Answer) -> list[D]:
    found = []
    for t in answer.tokens:
        value = clipped(ratio(t.drift), t.advantage, loss)
        if getattr(loss, "dual_clip", None) is not None and t.advantage < 0:
            value = minimum(value, const(-loss.dual_clip * t.advantage))
        found.append(value)
    return found


def ratios(loss: Any, answer: Answer) -> list[D]:
    """r of each token, by level."""
    if loss.importance_sampling_level == "token" and loss.name != "gspo_token":
        return [ratio(t.drift) for t in answer.tokens]
    mean = answer.mean(lambda t: t.drift)
    if loss.name != "gspo_token":
        return [ratio(mean)] * len(answer.tokens)
    by_token = loss.importance_sampling_level == "token"
    return [
        ratio((t.drift if by_token else mean).detach() + difference(t.logp, t.logp.detach())) for t in answer.tokens
    ]


def grpo(loss: Any, call: Call, answer: Answer) -> list[D]:
    ceiling = mp.inf if loss.delta is None else loss.delta
    found = zip(ratios(loss, answer), answer.tokens, strict=True)
    return [clipped(r, t.advantage, loss, ceiling) for r, t in found]


def learned(t: Token) -> D:
    return t.logp.clamp(-HUGE, HUGE)


def cispo(loss: Any, call: Call, answer: Answer) -> list[D]:
    cap = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    found = zip(ratios(loss, answer), answer.tokens, strict=True)
    return [-learned(t) * min(r.v, mpf(cap)) * t.advantage for r, t in found]


def sapo(loss: Any, call: Call, answer: Answer) -> list[D]:
    found = []
    for r, t in zip(ratios(loss, answer), answer.tokens, strict=True):
        tau = mpf(loss.sapo_temperature_pos if t.advantage > 0 else loss.sapo_temperature_neg)
        found.append(-sigmoid((r - 1) * tau) * 4 / tau * t.advantage)
    return found


def vespo(loss: Any, call: Call, answer: Answer) -> list[D]:
    low, high = mp.log(mpf(1e-8)), mpf(20)

    def bounded(x: mpf) -> mpf:
        return min(max(x, low), high)

    log_w = mp.fsum(max(min(t.drift.v, high), -high) for t in answer.tokens)
    if "importance_weight" in call.answers[0].given or any("importance_weight" in t.given for t in call.tokens):
        weights = [t.given["importance_weight"] for t in answer.tokens]
        log_w += mp.fsum(bounded(mp.log(w) if w else -mp.inf) for w in weights)
    log_w, found = bounded(log_w), []
    for t in answer.tokens:
        up = t.advantage >= 0
        k = mpf(loss.vespo_k_pos if up else loss.vespo_k_neg)
        lam = max(mpf(loss.vespo_lambda_pos if up else loss.vespo_lambda_neg), mpf(1e-4))
        found.append(-learned(t) * mp.exp(lam + k * log_w - lam * mp.exp(log_w)) * t.advantage)
    return found


def gmpo(loss: Any, call: Call, answer: Answer) -> list[D]:
    upper = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    kept = high_entropy(loss, call)
    own = [t for t in answer.tokens if id(t) in kept]
    drifts = [t.drift.clamp(high=upper) if t.advantage > 0 else t.drift.clamp(low=-loss.epsilon) for t in own]
    r = ratio(difference(total(drifts) / max(1, len(own)), 0.0))
    mean = mp.fsum(t.advantage for t in answer.tokens) / answer.size
    return [-r * mean] * len(answer.tokens)


def weighted_by(weight: Callable[[Any, Answer, Token], mpf]) -> Surrogate:
    """-stopgrad(w) log pi, with the advantage in w."""
    return lambda loss, call, answer: [-learned(t) * weight(loss, answer, t) for t in answer.tokens]


def w_reinforce(loss: Any, answer: Answer, t: Token) -> mpf:
    if t.advantage == 0:
        return mpf(0)
    return mpf(loss.positive) if t.advantage > 0 else -mpf(loss.negative)


def topr(loss: Any, answer: Answer, t: Token) -> mpf:
    whole = answer.sum(lambda t: t.drift).v
    return t.advantage * (1 if t.advantage >= 0 else mp.exp(min(whole, mpf(0))))


def cispo_verl(loss: Any, answer: Answer, t: Token) -> mpf:
    upper = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    return ratio(t.drift).clamp(1.0 - loss.epsilon, 1.0 + upper).v * t.advantage


def aspo(loss: Any, answer: Answer, t: Token) -> mpf:
    r, upper = ratio(t.drift).v, loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    if t.advantage > 0:
        return mpf(0) if r > 1.0 + upper else min(1 / r, mpf(loss.dual_clip)) * t.advantage
    return mpf(0) if r < 1.0 - loss.epsilon else min(r, mpf(loss.dual_clip)) * t.advantage


def rloo(loss: Any, call: Call, answer: Answer) -> list[D]:
    logp = answer.logp()
    given = "old_logp" in answer.given or any("old_logp" in t.given for t in call.tokens)
    r = ratio(difference(logp, answer.summed("old_logp") if given else logp.detach()))
    return [clipped(r, t.advantage, loss) for t in answer.tokens]


def covariances(call: Call) -> dict[int, mpf]:
    tokens = call.tokens
    logps = [max(t.logp.v, mpf(-HUGE)) for t in tokens]
    count = max(1, len(tokens))
    a, b = mp.fsum(t.advantage for t in tokens) / count, mp.fsum(logps) / count
    return {id(t): (t.advantage - a) * (x - b) for t, x in zip(tokens, logps, strict=True)}


def clip_cov(loss: Any, call: Call, answer: Answer) -> list[D]:
    found, drawn = covariances(call), []
    for place, t in enumerate(call.tokens):
        r, value = ratio(t.drift), clipped(ratio(t.drift), t.advantage, loss)
        if loss.clip_cov_lb < found[id(t)] < loss.clip_cov_ub and not value.v > -r.v * t.advantage:
            drawn.append(((place + 1 + 7919.0 * loss.seed) * 0.6180339887498949 % 1.0, id(t)))
    count = max(1, math.floor(len(call.tokens) * loss.clip_cov_ratio + 1e-9))
    dropped = {one for _, one in sorted(drawn)[:count]}
    values = [clipped(ratio(t.drift), t.advantage, loss) for t in answer.tokens]
    return [D(mpf(0)) if id(t) in dropped else v for t, v in zip(answer.tokens, values, strict=True)]


def kl_cov(loss: Any, call: Call, answer: Answer) -> list[D]:
    found = covariances(call)
    count = max(1, math.floor(len(call.tokens) * loss.kl_cov_ratio + 1e-9))
    largest = {id(t) for t in sorted(call.tokens, key=lambda t: -found[id(t)])[:count]}
    return [
        -ratio(t.drift) * t.advantage + (abs(t.drift) * loss.ppo_kl_coef if id(t) in largest else D(mpf(0)))
        for t in answer.tokens
    ]


FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(("ppo", "reinforce_plus_plus"), policy(ppo)),
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "gspo_token"), policy(grpo)),
    "cispo": policy(cispo),
    "sapo": policy(sapo),
    "vespo": policy(vespo),
    "gmpo": policy(gmpo),
    "gpg": policy(weighted_by(lambda loss, answer, t: t.advantage)),
    "asymre": policy(weighted_by(lambda loss, answer, t: t.advantage - mpf(loss.delta_v))),
    **dict.fromkeys(("w_reinforce", "psr", "nsr"), policy(weighted_by(w_reinforce))),
    "topr": policy(weighted_by(topr)),
    "cispo_verl": policy(weighted_by(cispo_verl)),
    "aspo": policy(weighted_by(aspo)),
    "rloo": policy(rloo),
    "clip_cov": policy(clip_cov),
    "kl_cov": policy(kl_cov),
}
