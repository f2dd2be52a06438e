"""The directional estimator of G: how fast the log-probs of D change along the gradient of D'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_po.diagnostics.gradients import norm

__all__ = ["AGREED", "along", "require_wide"]

# the first step, over the length of the parameters: too long for most models, and nothing is rounded away yet
FIRST = 2e-3
# two steps agree where no part differs by more than this share of the sum of the sides' sizes; what the two together
# say is nearer by orders of magnitude
AGREED = 5e-3
# from a step to the next
SHORTER = 4.0
# as often at most
STEPS = 6

Values = dict[str, float]


def require_wide(parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError for parameters that a small step would be lost in."""
    halves = [name for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        raise ValueError(
            f"directional needs parameters of 32 bits or more, a small step is lost in {halves[0]}: exact does not"
        )


def along(
    direction: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    measure: Callable[[], Values],
    scale: Callable[[Values], float],
    step: float | None,
) -> tuple[Values, float]:
    """Slopes of some numbers along a direction, from both sides: ``(f(+h) - f(-h)) / 2h``, for h and for h / 4, which
    together leave no error of the second order (Richardson). h shrinks until the two agree.

    Args:
        direction: by name.
        parameters: those that move; they are left as they were, to the bit.
        measure: the numbers by name, at the parameters of the moment.
        scale: of slopes, what an error of one of them is compared with.
        step: h over the length of the parameters; None: it is looked for, from 2e-3 on.

    Returns:
        the slopes, and how far the two steps were apart, over ``scale``; of the two that agreed best.
    """
    length = norm(direction.values())
    if length == 0.0:
        return dict.fromkeys(measure(), 0.0), 0.0
    size = (step or FIRST) * (norm(parameters[name] for name in direction) or 1.0) / length

    def slope(size: float) -> Values:
        with _moved(parameters, direction, size):
            ahead = measure()
        with _moved(parameters, direction, -size):
            behind = measure()
        return {name: (ahead[name] - behind[name]) / (2 * size) for name in ahead}

    wide, best, worse = slope(size), None, 0
    for _ in range(STEPS if step is None else 1):
        size /= SHORTER
        narrow = slope(size)
        found = {name: narrow[name] + (narrow[name] - wide[name]) / (SHORTER**2 - 1) for name in narrow}
        whole = scale(found)
        error = max((abs(narrow[name] - wide[name]) for name in narrow), default=0.0)
        error = error / whole if whole > 0 else error
        if not all(map(math.isfinite, found.values())):
            # no number is further from the truth than any, and from it nothing is larger
            error = math.inf
        worse = worse + 1 if best is not None and error >= best[1] else 0
        best = (found, error) if best is None or error < best[1] else best
        # rounding takes over where a smaller step agrees less, twice
        if best[1] <= AGREED or worse == 2:
            break
        wide = narrow
    assert best is not None
    return best


@contextmanager
def _moved(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], size: float) -> Iterator[None]:
    """The parameters moved along a direction, and afterwards back to the bit."""
    before = {name: parameters[name].detach().clone() for name in direction}
    try:
        for name, way in direction.items():
            parameters[name].data.add_(way, alpha=size)
        yield
    finally:
        for name, saved in before.items():
            parameters[name].data.copy_(saved)
