"""Device functions in float32 that keep relative accuracy, without libdevice, so that they also run interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["expm1", "shifted_exp", "to_logits"]


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0: a polynomial near 0, where the difference would cancel."""
    series = 1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * series))))
    return tl.where(x > -0.35, series, tl.exp(x) - 1.0)


@triton.jit
def to_logits(x, inverse, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Raw head output to logits z and the slope dz/dx."""
    if HAS_SOFTCAP:
        a = x * (logit_scale / softcap)
        e = tl.exp(-2.0 * tl.abs(a))
        a2 = a * a
        # the minimax polynomial of Cephes' tanhf; beyond it the difference to 1 is small
        series = -5.37397155531e-2 + a2 * (2.06390887954e-2 + a2 * -5.70498872745e-3)
        small = a + a * a2 * (-3.33332819422e-1 + a2 * (1.33314422036e-1 + a2 * series))
        large = 1.0 - 2.0 * e / (1.0 + e)
        tanh = tl.where(tl.abs(a) < 0.625, small, tl.where(a < 0, -large, large))
        z = tanh * (softcap * inverse)
        # 1 - tanh^2 without the difference
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e)) * (logit_scale * inverse)
    else:
        z = x * (logit_scale * inverse)
        slope = tl.zeros_like(z) + logit_scale * inverse
    return z, slope


@triton.jit
def shifted_exp(shift):
    """e^shift and shift e^shift; the second is 0 where the first is, also at -inf."""
    e = tl.exp(shift)
    return e, tl.where(e == 0.0, 0.0, e * shift)
