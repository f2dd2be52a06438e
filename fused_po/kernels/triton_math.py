"""Device functions in float32 that keep relative accuracy, without libdevice, so that they also run interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expm1", "shifted_exp", "to_logits"]


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0: a polynomial near 0, where the difference would cancel."""
    series = tl.fma(tl.fma(x, 1.0 / 5040.0, 1.0 / 720.0), x, 1.0 / 120.0)
    series = tl.fma(tl.fma(tl.fma(series, x, 1.0 / 24.0), x, 1.0 / 6.0), x, 0.5)
    return tl.where(x > -0.35, tl.fma(series * x, x, x), tl.exp(x) - 1.0)


@triton.jit
def to_logits(x, inverse, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Raw head output to logits z and the slope dz/dx."""
    if HAS_SOFTCAP:
        a = x * tl.div_rn(logit_scale, softcap)
        # up to 1 a fit of tanh(a) / a in a^2, relative error 5e-9: beyond, what 1 - tanh|a| is off by weighs little
        a2 = a * a
        fit = tl.fma(tl.fma(a2, -0.000358445890, 0.00230134302), a2, -0.00794607680)
        fit = tl.fma(tl.fma(fit, a2, 0.0214866381), a2, -0.0538797937)
        fit = tl.fma(tl.fma(fit, a2, 0.133323446), a2, -0.333332956)
        small = tl.fma(fit * a2, a, a)
        # 2 e^(-2|a|), then 1 - tanh|a|, of which 1 - tanh^2 is made without a difference
        twice = 2.0 * tl.exp(-2.0 * tl.abs(a))
        rest = twice / tl.fma(twice, 0.5, 1.0)
        large = 1.0 - rest
        is_small = tl.abs(a) < 1.0
        tanh = tl.where(is_small, small, tl.where(a < 0, -large, large))
        z = tanh * (softcap * inverse)
        slope = tl.where(is_small, tl.fma(-small, small, 1.0), tl.fma(rest, large, rest)) * (logit_scale * inverse)
    else:
        z = x * (logit_scale * inverse)
        slope = tl.zeros_like(z) + logit_scale * inverse
    return z, slope


@triton.jit
def shifted_exp(shift):
    """e^shift and shift e^shift; the second is 0 where the first is, also at -inf."""
    e = tl.exp(shift)
    return e, tl.where(e == 0.0, 0.0, e * shift)
