"""A drawn problem's result compared with the truth.

float64 problems are compared as a whole. In lower precision a loss may stand on the other side of a clip, for one ulp
in a log-prob; so statistics are compared first, and value and gradients with those that float64 makes of the
operation's own statistics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_po.ops.batches import masked_stats
from fused_po.stats import Stats
from tests.fuzz.calls import Found, operate
from tests.fuzz.draw import IGNORE, Problem
from tests.fuzz.truth import ULPS, Truth

__all__ = ["failures"]


def failures(problem: Problem, backend: str | None = None) -> list[str]:
    """What is wrong with the problem's result, one sentence each; none if all is right."""
    found = operate(problem, backend)
    return list(_differences(problem, found))


def _differences(problem: Problem, found: Found) -> Iterator[str]:
    truth = Truth.of(problem)
    keep = problem.labels != IGNORE
    exact = problem.dtype == torch.float64
    for name, got in found.stats.items():
        yield from _compare_statistic(problem, name, got, truth, keep)
    stats = truth.stats if exact else _own(found, truth)
    # rounding moves the log-probs that coefficients are made of, unless these are the operation's own
    value, triple, slack = truth.coefficients(stats, moved=exact)
    with torch.no_grad():
        scale = sum((triple[name].abs() * truth.slack[name]).sum() for name in triple) if exact else 0.0
        added = sum((triple[name] * stats[name]).abs().sum() for name in triple)
    eps = torch.finfo(problem.wide).eps
    bound = scale + ULPS * eps * (added + value.abs()) + torch.finfo(problem.wide).smallest_normal
    yield from _compare("value", found.value, value, bound)
    if exact and problem.split is None:
        plain = truth.plain()
        yield from _compare("value of plain_loss", found.value, plain, bound)
    yield from _gradients(problem, truth, triple, slack, found)
    for name, metric in found.metrics.items():
        if metric.ndim != 0:
            yield f"metric {name} has shape {tuple(metric.shape)}"
    if exact:
        yield from _metrics(problem, truth, found)


def _compare_statistic(problem: Problem, name: str, got: Tensor, truth: Truth, keep: Tensor) -> Iterator[str]:
    want, slack = truth.stats[name].detach(), truth.slack[name]
    if not bool((got[~keep] == 0).all()):
        yield f"{name} is not 0 at ignored labels"
    got, want, slack = got[keep], want[keep], slack[keep]
    if name == "is_top1":
        near = (truth.stats["max_logp"] - truth.stats["logp"]).detach()[keep]
        clear = (near == 0) | (near > 4 * slack)
        if problem.dtype == torch.float64 and not torch.equal(got[clear], want[clear]):
            yield f"is_top1 is {got.tolist()}, wanted {want.tolist()}"
        return
    yield from _compare(name, got, want, slack)


def _compare(what: str, got: Tensor, want: Tensor, bound: Tensor | float) -> Iterator[str]:
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        yield f"{what} has shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
        return
    same = (got == want) | (got.isnan() & want.isnan())
    wrong = ~same & ~((got - want).abs() <= bound)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        limit = torch.as_tensor(bound, dtype=torch.float64).broadcast_to(want.shape)
        a, b, c = (t[tuple(where)].item() for t in (got, want, limit))
        yield f"{what} at {where} is {a!r}, wanted {b!r} within {c:.3g}"


def _compare_gradient(problem: Problem, what: str, got: Tensor, want: Tensor, bound: Tensor) -> Iterator[str]:
    """A gradient beyond the largest number of its dtype is infinite in it; one that goes through full logits in half
    precision is lost where these are.
    """
    through_logits = problem.route == "token_stats"
    largest = torch.finfo(problem.dtype if through_logits else got.dtype).max
    lost = ~got.isfinite() if through_logits else got.isinf() & (got.double().sign() == want.sign())
    over = lost & (want.abs() + bound > largest)
    yield from _compare(what, torch.where(over, want.to(torch.float64), got.double()), want, bound)


def _own(found: Found, truth: Truth) -> dict[str, Tensor]:
    """The operation's own statistics, in float64; those that it did not return by the truth."""
    given = {name: v if v.dtype == torch.bool else v.double() for name, v in found.stats.items()}
    return {**{name: v.detach() for name, v in truth.stats.items()}, **given}


def _gradients(
    problem: Problem, truth: Truth, triple: dict[str, Tensor], slack: dict[str, Tensor], found: Found
) -> Iterator[str]:
    want = truth.through(triple)
    bound = truth.bounds(triple, slack)
    names = [name for name in want if name not in problem.frozen]
    for name in names:
        if name not in found.gradients:
            yield f"no gradient of {name}"
            continue
        yield from _compare_gradient(problem, f"gradient of {name}", found.gradients[name], want[name], bound[name])
    if problem.dtype == torch.float64 and problem.split is None:
        value = truth.plain()
        leaves = [truth.leaves[name] for name in names]
        if leaves and value.requires_grad:
            plain = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            for name, g in zip(names, plain, strict=True):
                g = torch.zeros_like(truth.leaves[name]) if g is None else g
                yield from _compare(f"gradient of {name} by plain autograd", found.gradients[name], g, bound[name])
    if found.parts:
        yield from _parts(problem, truth, triple, found, bound, names)


def _parts(
    problem: Problem,
    truth: Truth,
    triple: dict[str, Tensor],
    found: Found,
    bound: dict[str, Tensor],
    names: list[str],
) -> Iterator[str]:
    for name in names:
        parts = found.parts[name]
        whole = torch.stack([part.double() for part in parts.values()]).sum(0)
        finite = found.gradients[name].isfinite()
        limit = torch.where(finite, 2 * bound[name], torch.inf)
        yield from _compare(f"sum of the parts of {name}", whole, found.gradients[name], limit)
    if problem.split_gradients is not True:
        return
    role = problem.loss.role(truth.batch).reshape(problem.labels.shape)
    for part, members in (("positive", role > 0), ("negative", role < 0), ("rest", role == 0)):
        mine = {name: torch.where(members, c, 0.0) for name, c in triple.items()}
        want = truth.through(mine)
        for name in names:
            yield from _compare_gradient(
                problem, f"{part} part of {name}", found.parts[name][part], want[name], bound[name]
            )


def _metrics(problem: Problem, truth: Truth, found: Found) -> Iterator[str]:
    flat = {name: v.detach().reshape(-1) for name, v in truth.stats.items()}
    with torch.no_grad():
        want = problem.loss.metrics(masked_stats(Stats(**flat), truth.layout.mask), truth.batch)
    if want.keys() != found.metrics.keys():
        yield f"metrics are {sorted(found.metrics)}, wanted {sorted(want)}"
        return
    slack = sum(float(s.sum()) for name, s in truth.slack.items())
    for name, value in want.items():
        bound = 1e-9 * (1.0 + value.abs().nan_to_num(0.0, 0.0, 0.0)) + 10 * slack
        yield from _compare(f"metric {name}", found.metrics[name], torch.as_tensor(value), bound)
