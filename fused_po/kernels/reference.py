"""The kernels in plain PyTorch: the truth that the other backends are tested against, and the CPU path.

Rows are taken in blocks small enough for the cache, so that the passes over a row read it from there. All blocks of a
call share their buffers: fresh memory costs a page fault for every 4 KiB, which is more than the arithmetic. The
exponentials are those of ``torch.softmax``, one sweep that takes less time on a CPU than ``torch.exp`` alone.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fused_po.kernels.contract import PARTIALS, Coefficients, Span, Transform, accumulation_dtype

__all__ = ["row_grad", "row_regrad", "row_softmax", "row_stats", "scale", "unsupported"]

# elements of a block: 16 rows of a 32k vocabulary are 2 MiB in float32
BLOCK_ELEMENTS = 1 << 19


def unsupported(kernel: str, x: Tensor) -> str | None:
    """The reference runs everything."""
    return None


def row_stats(x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]) -> Tensor:
    """Partial statistics of each row, see ``contract``."""
    partials = _new_partials(x)
    buffers = _Buffers(x, span.width)
    for rows in _blocks(x):
        z, _ = _logits(x[rows, : span.width], transform, rows, buffers, keep_slope=False)
        partials[:, rows] = _sweep(z, labels[rows] - span.start, *_places(labels[rows], span), outputs, buffers)[0]
    return partials


def row_softmax(
    x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
) -> Tensor:
    """Partial statistics, and ``out <- (1[v = y] - p) J``, see ``contract``."""
    partials = _new_partials(x)
    buffers = _Buffers(x, span.width, out)
    for rows in _blocks(x):
        z, slope = _logits(x[rows, : span.width], transform, rows, buffers, keep_slope=True)
        here, column = _places(labels[rows], span)
        found, others = _sweep(z, labels[rows] - span.start, here, column, outputs, buffers)
        partials[:, rows] = found
        top, total, target = found[:3]  # (R,) each
        margin = (top - target) + total.log()
        rest = torch.where(total == 0, 0.0, torch.sigmoid(margin))
        torch.mul(others, rest.neg_().unsqueeze(1), out=z)
        own = torch.where(here, torch.sigmoid(margin), z.gather(1, column).squeeze(1))
        z.scatter_(1, column, own.unsqueeze(1))
        _store(z, slope, out, rows, span, labels[rows] < 0)
    return partials


def row_grad(
    x: Tensor,
    labels: Tensor,
    transform: Transform,
    span: Span,
    anchors: Tensor,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    """``out <- dL/dx``, see ``contract``.

    ``dL/dz_v = c (1[v = y] - p_v) - e p_v (log p_v + entropy) + l p_v`` and ``dL/dx = J dL/dz``.
    """
    buffers = _Buffers(x, span.width, out)
    for rows in _blocks(x):
        here, column = _places(labels[rows], span)
        own, shift, gap, _ = anchors[:, rows]  # (R,) each
        if coefficients.entropy is None:
            z, slope = _logits(x[rows, : span.width], transform, rows, buffers, keep_slope=True, changes=False)
            to = out[rows, : span.width]
            free = to.dtype == z.dtype and to.data_ptr() != z.data_ptr()
            p, top, most = _shares(z, to if free else None, buffers)
            c, of_lse = (0.0 if one is None else one[rows] for one in (coefficients.logp, coefficients.lse))
            # the shares are those among these columns; no probability is above 1, whatever infinite logits say
            factor = (of_lse - c) * ((top - shift) + gap).clamp(max=0.0).exp() / most
            grad = torch.mul(p, factor.unsqueeze(1), out=to if to.dtype == p.dtype else p)
            # c (1 - p_y) as a whole: c - c p_y would cancel at peaked rows
            exact = torch.where(here, of_lse * own.exp() - c * torch.expm1(own), grad.gather(1, column).squeeze(1))
            grad.scatter_(1, column, exact.unsqueeze(1))
            _store(grad, slope, out, rows, span, labels[rows] < 0)
            continue
        z, slope = _logits(x[rows, : span.width], transform, rows, buffers, keep_slope=True)
        log_p = z.sub_(shift.unsqueeze(1)).add_(gap.unsqueeze(1))
        log_p.scatter_(1, column, torch.where(here, own, log_p.gather(1, column).squeeze(1)).unsqueeze(1))
        p = torch.exp(log_p, out=buffers.second[: z.shape[0]])
        grad = _gradient(log_p, p, anchors[:, rows], coefficients, rows, here, column, buffers)
        _store(grad, slope, out, rows, span, labels[rows] < 0)


def row_regrad(
    tile: Tensor, labels: Tensor, transform: Transform, span: Span, anchors: Tensor, coefficients: Coefficients
) -> None:
    """G becomes ``dL/dx``, see ``contract``."""
    buffers = _Buffers(tile, span.width)
    for rows in _blocks(tile):
        here, column = _places(labels[rows], span)
        slope: Tensor | float = transform.logit_scale / transform.temperature
        if transform.temperatures is not None:
            slope = (transform.logit_scale / transform.temperatures[rows]).unsqueeze(1)  # (R, 1)
        # G = -p J at the classes other than the target
        p = buffers.second[: labels[rows].shape[0]].copy_(tile[rows, : span.width]).div_(slope).neg_()
        own = anchors[0, rows]
        p.scatter_(1, column, torch.where(here, own.exp(), p.gather(1, column).squeeze(1)).unsqueeze(1))
        log_p = torch.log(p, out=buffers.first[: p.shape[0]])
        log_p.scatter_(1, column, torch.where(here, own, log_p.gather(1, column).squeeze(1)).unsqueeze(1))
        grad = _gradient(log_p, p, anchors[:, rows], coefficients, rows, here, column, buffers)
        _store(grad, slope, tile, rows, span, labels[rows] < 0)


def scale(x: Tensor, factor: Tensor) -> None:
    """``x`` times a number (), in place."""
    if x.device.type != "cpu":
        # a number without dimensions would be rounded to the dtype of x; looking at it would wait for a GPU
        torch.mul(x, factor.reshape([1] * x.ndim), out=x)
    elif bool(factor != 1):
        x.mul_(factor)


def _places(labels: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Which rows have their label among the columns, and the column of each (R, 1), any one for the others."""
    local = labels - span.start  # (R,)
    return (local >= 0) & (local < span.width), local.clamp(0, span.width - 1).unsqueeze(1)


def _gradient(
    log_p: Tensor,
    p: Tensor,
    anchors: Tensor,
    coefficients: Coefficients,
    rows: slice,
    here: Tensor,
    column: Tensor,
    buffers: _Buffers,
) -> Tensor:
    """dL/dz (R, V) of a block of rows, over log p or p."""
    own, entropy = anchors[0], anchors[3]  # (R,)
    factor = torch.zeros_like(own)
    if coefficients.lse is not None:
        factor = factor + coefficients.lse[rows]
    if coefficients.logp is not None:
        factor = factor - coefficients.logp[rows]
    if coefficients.entropy is None:
        grad = p.mul_(factor.unsqueeze(1))
    else:
        e = coefficients.entropy[rows]
        # p log p is 0 where p is
        log_p.masked_fill_(torch.eq(p, 0, out=buffers.mask[: p.shape[0]]), 0.0)
        bracket = log_p.add_(entropy.unsqueeze(1)).mul_(e.neg().unsqueeze(1))
        grad = bracket.add_(factor.unsqueeze(1)).mul_(p)
    if coefficients.logp is not None:
        # c (1 - p_y) as a whole: c - c p_y would cancel at peaked rows
        exact = grad.gather(1, column).squeeze(1) + coefficients.logp[rows] * own.exp()
        exact = exact - coefficients.logp[rows] * torch.expm1(own)
        grad.scatter_(1, column, torch.where(here, exact, grad.gather(1, column).squeeze(1)).unsqueeze(1))
    return grad


def _blocks(x: Tensor) -> list[slice]:
    count, width = x.shape
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _new_partials(x: Tensor) -> Tensor:
    return torch.empty(len(PARTIALS), x.shape[0], dtype=accumulation_dtype(x.dtype), device=x.device)


class _Buffers:
    """Of a block: (R, V) each, made when they are first used.

    Attributes:
        in_place: the first is x itself, which is about to be overwritten.
    """

    def __init__(self, x: Tensor, width: int, out: Tensor | None = None) -> None:
        dtype = accumulation_dtype(x.dtype)
        self._like, self._shape = x, (min(x.shape[0], max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))), width)
        self.in_place = out is not None and out.data_ptr() == x.data_ptr() and x.dtype == out.dtype == dtype

    def _new(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._shape, dtype=dtype, device=self._like.device)

    @cached_property
    def first(self) -> Tensor:
        return self._new(accumulation_dtype(self._like.dtype))

    @cached_property
    def second(self) -> Tensor:
        return self._new(accumulation_dtype(self._like.dtype))

    @cached_property
    def mask(self) -> Tensor:
        return self._new(torch.bool)

    @cached_property
    def columns(self) -> Tensor:
        return torch.arange(self._shape[1], device=self._like.device)


def _logits(
    x: Tensor, transform: Transform, rows: slice, buffers: _Buffers, keep_slope: bool, changes: bool = True
) -> tuple[Tensor, Tensor | float | None]:
    """A block of logits z (R, V) and, if asked for, the slope J = dz/dx: a number, (R, 1) or (R, V).

    Without ``changes`` to come they may be x itself.
    """
    inverse: Tensor | float = 1.0 / transform.temperature
    if transform.temperatures is not None:
        inverse = transform.temperatures[rows].reciprocal().unsqueeze(1)  # (R, 1)
    as_they_are = transform == Transform() and x.dtype == accumulation_dtype(x.dtype)
    if as_they_are and not changes:
        return x, 1.0
    z = x if buffers.in_place else buffers.first[: x.shape[0]].copy_(x)
    slope: Tensor | float | None = None
    if transform.softcap is None:
        factor = inverse * transform.logit_scale
        if isinstance(factor, Tensor) or factor != 1.0:
            z.mul_(factor)
        slope = factor
    else:
        z.mul_(transform.logit_scale / transform.softcap).tanh_()
        if keep_slope:
            slope = (1.0 - z * z).mul_(inverse * transform.logit_scale)
        z.mul_(inverse * transform.softcap)
    return z, slope if keep_slope else None


def _shares(z: Tensor, out: Tensor | None, buffers: _Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax of a block over its columns (R, V), the largest logit and its share (R,); 0 and 1 where that logit is
    infinite. ``out`` takes the softmax where there is a place.
    """
    top = z.amax(1)
    p = torch.softmax(z, 1, out=buffers.second[: z.shape[0]] if out is None else out)
    odd = top.isinf()
    # looking would wait for a GPU
    if z.device.type != "cpu" or bool(odd.any()):
        p.masked_fill_(odd.unsqueeze(1), 0.0)
    return p, top, torch.where(odd, 1.0, p.amax(1))


def _sweep(
    z: Tensor, local: Tensor, here: Tensor, column: Tensor, outputs: tuple[str, ...], buffers: _Buffers
) -> tuple[Tensor, Tensor]:
    """Partials (7, R) of a block, and the softmax (R, V) over its classes other than the target; z is changed."""
    at_column = z.gather(1, column).squeeze(1)
    partials = z.new_zeros(len(PARTIALS), z.shape[0])
    if "mean_logit" in outputs:
        partials[5] = z.sum(1)
    z.scatter_(1, column, torch.where(here, -torch.inf, at_column).unsqueeze(1))
    p, top, most = _shares(z, None, buffers)
    if "is_top1" in outputs:
        partials[6] = _before(z, local, top, here & (at_column == top), buffers)
    # e^{z - max} is p / most
    partials[0] = top
    partials[1] = torch.where(top == -torch.inf, 0.0, torch.where(top == torch.inf, torch.nan, most.reciprocal()))
    partials[2] = torch.where(here, at_column, -torch.inf)
    if "log_sum_sq_probs" in outputs:
        squares = torch.square(p, out=z) if "entropy" not in outputs else torch.square(p)
        partials[4] = squares.sum(1) / most.square()
    if "entropy" in outputs:
        log_e = z.sub_(torch.where(top == -torch.inf, 0.0, top).unsqueeze(1))
        # where p is 0 anyway, also in float64: 0 * -inf would not be
        partials[3] = log_e.clamp_(min=-1000.0).mul_(p).sum(1) / most
    return partials, p


def _before(z: Tensor, local: Tensor, top: Tensor, tied: Tensor, buffers: _Buffers) -> Tensor:
    """What decides ties in favour of the classes before each label (R,), -inf where there are none."""
    lowest = z.new_full((), -torch.inf)
    if z.device.type == "cpu":
        # rows are read again where a tie has to be decided, and nowhere else
        found = torch.where(local > 0, top, lowest)
        for row in tied.nonzero().flatten().tolist():
            found[row] = z[row, : int(local[row])].amax() if local[row] > 0 else lowest
        return found
    behind = torch.ge(buffers.columns, local.unsqueeze(1), out=buffers.mask[: z.shape[0]])
    return torch.where(behind, lowest, z).amax(1)


def _store(grad: Tensor, slope: Tensor | float | None, out: Tensor, rows: slice, span: Span, ignored: Tensor) -> None:
    if slope is not None and (isinstance(slope, Tensor) or slope != 1.0):
        grad.mul_(slope)
    # looking would wait for a GPU; filled and not multiplied, since 0 * nan is not 0
    if grad.is_cuda or bool(ignored.any()):
        grad.masked_fill_(ignored.unsqueeze(1), 0)
    target = out[rows, : span.width]
    if target.data_ptr() != grad.data_ptr():
        target.copy_(grad)
    out[rows, span.width :] = 0
