"""Instructions that are only near to what they are named after: off by up to what the PTX manual allows.

The error is drawn from the operands, so that the same operands give the same result, as on a GPU, and from a salt, so
that another run of the tests is another GPU. Values that the manual fixes are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.numerics import flush

__all__ = ["FUNCTIONS"]

Array = npt.NDArray[Any]
F4, F8, U4 = np.float32, np.float64, np.uint32


def _noise(bits: Array, salt: int) -> Array:
    """In [-1, 1)."""
    mixed = (bits ^ U4(salt * 2654435761 % (1 << 32))) * U4(0x9E3779B1)
    mixed = (mixed ^ (mixed >> U4(15))) * U4(0x85EBCA77)
    return mixed.astype(F8) * 2.0**-31 - 1.0


def _off(exact: Array, bound: Array, noise: Array) -> Array:
    """A float32 within an absolute bound of what it should be: the last rounding must not carry it over."""
    found = (exact + bound * noise).astype(F4)
    right = np.abs(found - exact) <= bound
    return np.where(right, found, exact.astype(F4))


def _relative(exact: Array, bound: float) -> Array:
    return np.abs(exact) * bound


def _places(exact: Array, count: int) -> Array:
    """Units in the last place."""
    return count * np.spacing(np.abs(exact.astype(F4))).astype(F8)


def ex2(x: Array, salt: int) -> Array:
    """ex2.approx: relative error 2^-22, and, by the manual of CUDA, two units in the last place; 2^0 is 1."""
    exact = np.exp2(x.astype(F8))
    found = _off(exact, np.minimum(_relative(exact, 2.0**-22), _places(exact, 2)), _noise(x.view(U4), salt))
    return np.where(x == 0, F4(1), found)


def ex2_flushed(x: Array, salt: int) -> Array:
    """ex2.approx.ftz"""
    return flush(ex2(flush(x), salt))


def rcp(x: Array, salt: int) -> Array:
    """rcp.approx: one unit in the last place."""
    exact = 1.0 / x.astype(F8)
    return _off(exact, _places(exact, 1), _noise(x.view(U4), salt))


def rcp_flushed(x: Array, salt: int) -> Array:
    return flush(rcp(flush(x), salt))


def lg2(x: Array, salt: int) -> Array:
    """lg2.approx: absolute error 2^-22 between 0.5 and 2, relative 2^-22 elsewhere."""
    exact = np.log2(x.astype(F8))
    bound = np.where((x > F4(0.5)) & (x < F4(2.0)), 2.0**-22, _relative(exact, 2.0**-22))
    return _off(exact, bound, _noise(x.view(U4), salt))


def rsqrt(x: Array, salt: int) -> Array:
    """rsqrt.approx: relative error 2^-22.9."""
    exact = 1.0 / np.sqrt(x.astype(F8))
    return _off(exact, _relative(exact, 2.0**-22.9), _noise(x.view(U4), salt))


def sqrt(x: Array, salt: int) -> Array:
    """sqrt.approx: relative error 2^-23."""
    exact = np.sqrt(x.astype(F8))
    return _off(exact, _relative(exact, 2.0**-23), _noise(x.view(U4), salt))


def tanh(x: Array, salt: int) -> Array:
    """tanh.approx: relative error 2^-11."""
    exact = np.tanh(x.astype(F8))
    return _off(exact, _relative(exact, 2.0**-11), _noise(x.view(U4), salt))


def divide_full(a: Array, b: Array, salt: int) -> Array:
    """div.full and div.approx: two units in the last place."""
    a, b = np.broadcast_arrays(a, b)
    bits = np.ascontiguousarray(a).view(U4) * U4(0x27D4EB2F) ^ np.ascontiguousarray(b).view(U4)
    exact = a.astype(F8) / b
    return _off(exact, _places(exact, 2), _noise(bits, salt))


FUNCTIONS: dict[str, Any] = {
    "approximate_ex2": ex2,
    "approximate_ex2_ftz": ex2_flushed,
    "approximate_rcp": rcp,
    "approximate_rcp_ftz": rcp_flushed,
    "approximate_lg2": lg2,
    "approximate_rsqrt": rsqrt,
    "approximate_sqrt": sqrt,
    "approximate_tanh": tanh,
    "approximate_div": divide_full,
}
