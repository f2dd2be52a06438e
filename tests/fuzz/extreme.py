"""Losses on extreme numbers against their documented formulas, evaluated with 60 digits and differentiated exactly.

Log-probs of 0, -1e-30, -1e4 and -inf under the policy; of +-1e4 and one of +-inf under reference and sampler;
advantages, weights and shifts up to 1e4.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from mpmath import mp, mpf
from torch import Tensor

from fused_po import linear_loss, linear_token_stats, losses, stats_loss
from fused_po.losses.batch import OPTIONAL, SCALAR, SIDE_INPUTS, SPREAD, SUMMED, TOKEN_FLAGS
from fused_po.ops.plain import plain_stats
from fused_po.stats import STATISTICS, Stats
from tests.fuzz import formulas_pairs, formulas_policy
from tests.fuzz.answers import Answer, Call, Token
from tests.fuzz.draw import IGNORE, draw_loss, takes_sums, wants_pairs
from tests.fuzz.dual import D

__all__ = ["FORMULAS", "extreme_failures"]

FORMULAS = formulas_pairs.FORMULAS | formulas_policy.FORMULAS
INF = float("inf")
POLICY = (0.0, -1e-30, -1e4, -INF)
# beside the one infinity of a problem: a sum over both has no value
OTHERS = (0.0, -1e4, 1e4)
DIGITS = 60


def extreme_failures(seed: int, names: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """The problem of a seed in words, and what is wrong with its result."""
    rng = Random(seed)
    torch.manual_seed(seed)
    loss = draw_loss(rng, names)
    while isinstance(loss, losses.Mixture):
        loss = draw_loss(rng, names)
    dtype = rng.choice((torch.float64, torch.float32))
    labels = _labels(rng, loss)
    head = _head(rng, labels) if rng.random() < 0.3 else None
    if head is not None:
        dtype = torch.float64
    stats = _stats(rng, labels, dtype) if head is None else linear_token_stats(*head, labels, outputs=STATISTICS)
    side_inputs = _side_inputs(rng, loss, labels, stats, dtype)
    normalisers = {
        name: rng.choice((1, 7, 2.5))
        for name in ("num_items", "num_sequences", "num_chosen_items")
        if rng.random() < 0.3
    }
    if head is not None:
        stats = Stats(**{name: value.detach() for name, value in stats.present().items()})
    words = f"seed {seed}: {loss}, {dtype}, labels {labels.tolist()}, {stats}, {side_inputs}, {normalisers}"
    arguments = (loss, labels, stats, side_inputs, normalisers)
    exact, rounded = _evaluate(*arguments, digits=DIGITS), _evaluate(*arguments, digits=15)
    if head is not None:
        hidden, weight = head[0].requires_grad_(), head[1]
        scratch = rng.choice((0, 1 << 20))
        out = linear_loss(hidden, weight, labels, loss, scratch_bytes=scratch, **normalisers, **side_inputs)
        (gradient,) = torch.autograd.grad(out.loss, hidden)
        return words, list(_through_head(out.loss.detach(), gradient, head, exact, rounded, labels))
    leaves = {name: getattr(stats, name).clone().requires_grad_() for name in loss.differentiates}
    given = Stats(**{**stats.present(), **leaves})
    out = stats_loss(given, labels, loss, **normalisers, **side_inputs)
    got = dict(zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), strict=True))
    return words, list(_differences(out.loss.detach(), got, exact, rounded, labels))


def _labels(rng: Random, loss: losses.Loss) -> Tensor:
    count = 2 * rng.randint(1, 2) if wants_pairs(loss) else rng.randint(1, 3)
    labels = torch.zeros(count, rng.randint(1, 3), dtype=torch.int64)
    labels[torch.rand(labels.shape) < rng.choice((0.0, 0.3))] = IGNORE
    return labels


def _head(rng: Random, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a head of four classes, whose logits reach into the hundreds at times."""
    scale = rng.choice((1.0, 10.0, 100.0))
    labels[labels != IGNORE] = torch.randint(0, 4, (int((labels != IGNORE).sum()),))
    return scale * torch.randn(*labels.shape, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)


def _stats(rng: Random, labels: Tensor, dtype: torch.dtype) -> Stats:
    logp = -3 * torch.rand(labels.shape)
    share = rng.choice((0.0, 0.2, 0.6))
    for index in range(logp.numel()):
        if rng.random() < share:
            logp.view(-1)[index] = rng.choice(POLICY)
    named = {name: torch.rand(labels.shape).to(dtype) for name in ("entropy", "lse", "mean_logit", "max_logp")}
    top = torch.rand(labels.shape) < 0.5
    return Stats(logp=logp.to(dtype), log_sum_sq_probs=-torch.rand(labels.shape).to(dtype), is_top1=top, **named)


def _side_inputs(rng: Random, loss: losses.Loss, labels: Tensor, stats: Stats, dtype: torch.dtype) -> dict[str, Any]:
    """What float32 holds exactly."""
    found: dict[str, Any] = {}
    count, share, infinity = labels.shape[0], rng.choice((0.0, 0.3, 0.8)), rng.choice((-INF, -INF, INF))
    for name in sorted(loss.needs & SIDE_INPUTS):
        if name in OPTIONAL and rng.random() < 0.3:
            continue
        if name in SCALAR:
            low = 0.0 if name == "kl" else -1e4
            found[name] = rng.choice((0.0, 1e4, low, 0.3))
        elif name in TOKEN_FLAGS:
            found[name] = torch.rand(labels.shape) < 0.3
        elif name == "desirable":
            found[name] = torch.rand(count) < 0.5
        else:
            sums = name in SUMMED and takes_sums(loss, name)
            shape = (count,) if (sums or name in SPREAD) and rng.random() < 0.4 else tuple(labels.shape)
            values = _values(rng, name, torch.empty(shape), share, infinity)
            found[name] = values.to(dtype)
    return found


def _values(rng: Random, name: str, values: Tensor, share: float, infinity: float) -> Tensor:
    flat = values.view(-1)
    for index in range(flat.numel()):
        extreme = rng.random() < share
        if name in SUMMED:
            flat[index] = rng.choice((*OTHERS, infinity)) if extreme else -3 * rng.random()
        elif name == "advantage":
            flat[index] = rng.choice((0.0, 1e4, -1e4)) if extreme else rng.gauss(0.0, 1.0)
        else:
            flat[index] = rng.choice((0.0, 1e4, 1e-4)) if extreme else 0.5 + rng.random()
    return values


def _evaluate(
    loss: Any, labels: Tensor, stats: Stats, side_inputs: dict[str, Any], normalisers: dict[str, Any], *, digits: int
) -> list[D]:
    """What the loss is the sum of."""
    with mp.workdps(digits):
        return FORMULAS[loss.name](loss, _call(labels, stats, side_inputs, normalisers))


def _call(labels: Tensor, stats: Stats, side_inputs: dict[str, Any], normalisers: dict[str, Any]) -> Call:
    count, length = labels.shape
    answers = []
    for row in range(count):
        of_sequence = {n: v[row] for n, v in side_inputs.items() if isinstance(v, Tensor) and v.ndim == 1}
        answer = Answer([], {n: bool(v) if n == "desirable" else mpf(float(v)) for n, v in of_sequence.items()})
        spread = {n: v for n, v in answer.given.items() if n in SPREAD}
        for column in range(length):
            if labels[row, column] == IGNORE:
                continue
            index = row * length + column
            own = {n: mpf(float(v[row, column])) for n, v in side_inputs.items() if getattr(v, "ndim", 0) == 2}
            one = {name: float(getattr(stats, name)[row, column]) for name in ("logp", "entropy", "log_sum_sq_probs")}
            logp, entropy = D(mpf(one["logp"]), {index: mpf(1)}), D(mpf(one["entropy"]), {-1 - index: mpf(1)})
            answer.tokens.append(Token(logp, entropy, mpf(one["log_sum_sq_probs"]), {**spread, **own}))
        answers.append(answer)
    lengths = [len(answer.tokens) for answer in answers]
    sequences = mpf(normalisers.get("num_sequences", max(count, 1)))
    share = sequences / max(count, 1)
    return Call(
        answers=answers,
        scalars={n: mpf(v) for n, v in side_inputs.items() if isinstance(v, float)},
        num_items=mpf(normalisers.get("num_items", sum(lengths) or 1)),
        num_sequences=sequences,
        num_chosen=mpf(normalisers.get("num_chosen_items", max(1, sum(lengths[: count // 2])) * share)),
        num_call=max(1, sum(lengths)) * share,
    )


def _differences(
    value: Tensor, got: dict[str, Tensor], exact: list[D], rounded: list[D], labels: Tensor
) -> Iterator[str]:
    with mp.workdps(DIGITS):
        parts = [one.v for one in exact]
        added = mp.fsum(abs(part) for part in parts)
        yield from _compare("value", value, parts, [one.v for one in rounded], added)
        for name, gradient in got.items():
            for index, one in enumerate(gradient.flatten()):
                place = index if name == "logp" else -1 - index
                if labels.flatten()[index] == IGNORE:
                    if one != 0:
                        yield f"d/d{name} at an ignored label is {one.item()}"
                    continue
                slopes = [part.d.get(place, mpf(0)) for part in exact]
                others = [part.d.get(place, mpf(0)) for part in rounded]
                added = mp.fsum(part.added.get(place, mpf(0)) for part in exact)
                yield from _compare(f"d/d{name} [{index}]", one, slopes, others, added, saturates=True)


def _through_head(
    value: Tensor,
    gradient: Tensor,
    head: tuple[Tensor, Tensor],
    exact: list[D],
    rounded: list[D],
    labels: Tensor,
) -> Iterator[str]:
    """The gradient of hidden states: exact coefficients times the slopes of the statistics, those by autograd."""
    hidden = head[0].detach().requires_grad_()
    stats = plain_stats(hidden @ head[1].t(), labels, outputs=("logp", "entropy"))
    # autograd has the slope at a class that is certain as 1 - p, to an ulp of 1
    keep, steepest = labels != IGNORE, 2.0 * head[1].abs().max().item() + 1e-300
    slopes = {
        name: torch.autograd.grad(getattr(stats, name)[keep].sum(), hidden, retain_graph=True)[0].flatten(0, 1)
        for name in ("logp", "entropy")
    }  # (B S, H) each
    with mp.workdps(DIGITS):
        parts = [one.v for one in exact]
        added = mp.fsum(abs(part) for part in parts)
        yield from _compare("value", value, parts, [one.v for one in rounded], added)
        for index, row in enumerate(gradient.flatten(0, 1)):
            for column, one in enumerate(row):
                want, bound = mpf(0), mpf(1e-300)
                for name, place in (("logp", index), ("entropy", -1 - index)):
                    slope = slopes[name][index][column].item()
                    c, other = (mp.fsum(p.d.get(place, mpf(0)) for p in terms) for terms in (exact, rounded))
                    size = mp.fsum(part.added.get(place, mpf(0)) for part in exact)
                    want += c * slope
                    bound += (64 * abs(other - c) + mpf(1e-12) * size + mpf(1e-11) * abs(c)) * steepest
                if not abs(mpf(one.item()) - want) <= bound:
                    wanted = f"{mp.nstr(want, 17)} within {mp.nstr(bound, 3)}"
                    yield f"gradient of hidden [{index}, {column}] is {one.item()!r}, wanted {wanted}"


def _compare(
    what: str, got: Tensor, parts: list[mpf], rounded: list[mpf], added: mpf, *, saturates: bool = False
) -> Iterator[str]:
    """A sum against its exact parts, within what float64 and the result's dtype round of what was ``added``."""
    want, other = mp.fsum(parts), mp.fsum(rounded)
    largest = mpf(torch.finfo(got.dtype).max)
    if mp.isnan(want):
        yield f"{what}: the formula itself is no number"
        return
    if abs(want) > largest and saturates:
        want = mp.sign(want) * largest
    if got.isnan():
        yield f"{what} is NaN, wanted {mp.nstr(want, 17)}"
        return
    if got.isinf() or mp.isinf(want):
        # beyond the largest number of the dtype
        over = abs(want) >= largest * (1 - mpf(torch.finfo(got.dtype).eps)) and mp.sign(want) == mp.sign(got.item())
        if not (got.isinf() and over):
            yield f"{what} is {got.item()}, wanted {mp.nstr(want, 17)}"
        return
    lost = abs(other - want) if mp.isfinite(other) else mpf(0)
    info = torch.finfo(got.dtype)
    bound = 64 * lost + mpf(1e-12) * added + 4 * info.eps * abs(want) + info.smallest_normal
    if not abs(mpf(got.item()) - want) <= bound:
        yield f"{what} is {got.item()!r}, wanted {mp.nstr(want, 17)} within {mp.nstr(bound, 3)}"
