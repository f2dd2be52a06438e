"""What instructions compute, on numpy vectors with an element for each thread; registers are unsigned integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FUNCTIONS"]

Array = npt.NDArray[Any]

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I2, I4, I8 = np.int16, np.int32, np.int64
F2, F4, F8 = np.float16, np.float32, np.float64


def flush(x: Array) -> Array:
    """What is denormal becomes a zero of its sign."""
    return np.where(np.abs(x) < F4(1.17549435e-38), np.copysign(F4(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in float64; its sum is rounded twice, which shows once in some 2^29 cases."""
    return np.add(np.multiply(a, b, dtype=F8), c, dtype=F8).astype(F4)


def fma_down(a: Array, b: Array, c: Array) -> Array:
    """Rounded towards minus infinity."""
    wide = np.add(np.multiply(a, b, dtype=F8), c, dtype=F8)
    near = wide.astype(F4)
    return np.where(near > wide, np.nextafter(near, F4(-np.inf)), near)


def fma_up(a: Array, b: Array, c: Array) -> Array:
    return -fma_down(-a, b, -c)


def saturate(x: Array) -> Array:
    """Into [0, 1]; NaN becomes 0."""
    return np.fmin(np.fmax(x, F4(0)), F4(1))


def from_bf16(bits: Array) -> Array:
    return (bits.astype(U4) << U4(16)).view(F4)


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even, as uint16."""
    bits = x.view(U4)
    rounded = (bits + (U4(0x7FFF) + ((bits >> U4(16)) & U4(1)))) >> U4(16)
    return np.where(np.isnan(x), U4(0x7FFF), rounded).astype(U2)


def to_f16(x: Array) -> Array:
    return np.where(np.isnan(x), U2(0x7FFF), x.astype(F2).view(U2))


def to_integer(x: Array, kind: Any) -> Array:
    """Of a float that is whole already; what is out of range saturates, NaN becomes 0."""
    info = np.iinfo(kind)
    wide = np.nan_to_num(x.astype(F8), nan=0.0)
    inside = (wide > float(info.min) - 0.5) & (wide < float(info.max))
    found = np.where(inside, wide, 0.0).astype(kind)
    found = np.where(wide >= float(info.max), kind(info.max), found)
    return np.where(wide <= float(info.min), kind(info.min), found)


def divide(a: Array, b: Array) -> Array:
    """Of integers, towards 0."""
    q = a // b
    return q + ((q < 0) & (q * b != a)).astype(q.dtype)


def bits_extract(a: Array, begin: Array, count: Array) -> Array:
    """bfe, unsigned."""
    width = 8 * a.dtype.itemsize
    begin, count = begin.astype(a.dtype) & a.dtype.type(255), count.astype(a.dtype) & a.dtype.type(255)
    mask = np.where(count >= width, ~a.dtype.type(0), (a.dtype.type(1) << count) - a.dtype.type(1))
    return (a >> begin) & mask


def bits_extract_signed(a: Array, begin: Array, count: Array) -> Array:
    """bfe on int32 or int64: the highest bit of the field fills up."""
    wide = a.astype(I8)
    begin, count = (begin & U4(255)).astype(I8), (count & U4(255)).astype(I8)
    last = np.minimum(begin + count - 1, 8 * a.dtype.itemsize - 1)
    left = 63 - last
    found = ((wide << left) >> left) >> begin
    return np.where(count == 0, I8(0), found).astype(a.dtype)


def bits_insert(a: Array, into: Array, begin: Array, count: Array) -> Array:
    """bfi"""
    kind = into.dtype.type
    begin, count = begin.astype(kind), count.astype(kind)
    ones = np.where(count >= 8 * into.dtype.itemsize, ~kind(0), (kind(1) << count) - kind(1))
    mask = ones << begin
    return (into & ~mask) | ((a << begin) & mask)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of the eight of (b, a), or its sign."""
    both = (b.astype(U8) << U8(32)) | a
    found = U4(0)
    for place in range(4):
        choice = (selector >> U4(4 * place)) & U4(15)
        byte = (both >> (U8(8) * (choice & U4(7)))).astype(U4) & U4(255)
        sign = np.where(byte >> U4(7) != 0, U4(255), U4(0))
        found = found | (np.where(choice & U4(8) != 0, sign, byte) << U4(8 * place))
    return found


def funnel_right(a: Array, b: Array, by: Array) -> Array:
    """shf.r.wrap: the low half of (b : a) >> by."""
    both = (b.astype(U8) << U8(32)) | a
    return (both >> (by & U4(31)).astype(U8)).astype(U4)


def funnel_left(a: Array, b: Array, by: Array) -> Array:
    """shf.l.wrap: the high half of (b : a) << by."""
    both = (b.astype(U8) << U8(32)) | a
    return ((both << (by & U4(31)).astype(U8)) >> U8(32)).astype(U4)


def high_product(a: Array, b: Array) -> Array:
    """mul.hi of 32 bits."""
    wide = I8 if a.dtype == I4 else U8
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: bit i of the table is the result where the bits of a, b and c spell i."""
    found = U4(0)
    for number in range(8):
        if table >> number & 1:
            parts = (x if number >> (2 - place) & 1 else ~x for place, x in enumerate((a, b, c)))
            first, second, third = parts
            found = found | (first & second & third)
    return found


def count_bits(a: Array) -> Array:
    """popc"""
    return np.unpackbits(a.view(U1).reshape(-1, a.dtype.itemsize), axis=1).sum(1).astype(U4)


def full(count: int, value: Any) -> Array:
    return np.full(count, value)


# what the source that `translate` writes may name
FUNCTIONS: dict[str, Any] = {
    "np": np,
    **{name: globals()[name] for name in ("U1", "U2", "U4", "U8", "I2", "I4", "I8", "F2", "F4", "F8")},
    **{
        f.__name__: f
        for f in (
            *(flush, fma, fma_down, fma_up, saturate, from_bf16, to_bf16, to_f16, to_integer, divide, bits_extract),
            *(bits_extract_signed, bits_insert, permute, funnel_right, funnel_left, high_product, logic, count_bits),
            full,
        )
    },
}
