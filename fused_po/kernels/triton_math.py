"""Device functions in float32 that keep relative accuracy, without libdevice, so that they also run interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LOG2E", "expm1", "reciprocal", "shifted_exp", "to_logits"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0: a polynomial near 0, where the difference would cancel."""
    series = tl.fma(tl.fma(x, 1.0 / 5040.0, 1.0 / 720.0), x, 1.0 / 120.0)
    series = tl.fma(tl.fma(tl.fma(series, x, 1.0 / 24.0), x, 1.0 / 6.0), x, 0.5)
    return tl.where(x > -0.35, tl.fma(series * x, x, x), tl.exp(x) - 1.0)


@triton.jit
def reciprocal(x):
    """1 / x rounded once, of a finite x: the plain ``/`` is off by two units."""
    y = 1.0 / x
    return tl.fma(tl.fma(-y, x, 1.0), y, y)


@triton.jit
def to_logits(x, inverse, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Raw head output to logits z, and dz/dx over its value at 0, which is logit_scale times inverse."""
    if HAS_SOFTCAP:
        a = x * (logit_scale * reciprocal(softcap))
        # up to 0.9 a fit of tanh(a) / a in a^2, relative error 2e-8: beyond, what 1 - tanh|a| is off by weighs little
        a2 = a * a
        fit = tl.fma(tl.fma(a2, 0.00130395952, -0.0068600555), a2, 0.0209041256)
        fit = tl.fma(tl.fma(tl.fma(fit, a2, -0.0537214912), a2, 0.133303598), a2, -0.333332121)
        small = tl.fma(fit * a2, a, a)
        # 2 e^(-2|a|), then 1 - tanh|a|, of which 1 - tanh^2 is made without a difference
        twice = tl.exp2(tl.fma(tl.abs(a), -2.0 * LOG2E, 1.0))
        rest = twice / tl.fma(twice, 0.5, 1.0)
        large = 1.0 - rest
        is_small = tl.abs(a) < 0.9
        tanh = tl.where(is_small, small, tl.where(a < 0, -large, large))
        z = tanh * (softcap * inverse)
        bend = tl.where(is_small, tl.fma(-small, small, 1.0), tl.fma(rest, large, rest))
    else:
        z = x * (logit_scale * inverse)
        bend = 1.0
    return z, bend


@triton.jit
def shifted_exp(shift):
    """e^shift and shift e^shift; the second is 0 where the first is, also at -inf."""
    e = tl.exp(shift)
    return e, tl.where(e == 0.0, 0.0, e * shift)
