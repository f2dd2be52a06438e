"""The kernels as ``torch.library`` operators: schemas defined once, in front of ``select``.

They exist on every machine and pass ``torch.library.opcheck``. Arguments are flat because schemas are:
``temperatures`` to ``logit_scale`` spell a ``Transform``, ``start`` and ``stop`` a ``Span``, ``outputs`` is a
comma-separated list from ``STATISTICS``. Labels reach a backend contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.kernels.contract import PARTIALS, Coefficients, Span, Transform, accumulation_dtype
from fused_po.kernels.select import select, unsupported

__all__ = ["REGRAD_BACKENDS", "row_grad", "row_regrad", "row_softmax", "row_stats", "scale"]

SCALE_BACKENDS = {"triton": f"{__package__}.triton_scale", "reference": f"{__package__}.reference"}
# those that turn G into dL/dx
REGRAD_BACKENDS = {"triton": f"{__package__}.triton_regrad", "reference": f"{__package__}.reference"}


def row_stats(
    x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], backend: str | None
) -> Tensor:
    """Partial statistics (7, N) of raw head outputs ``x`` (N, V), see ``contract``."""
    return torch.ops.fused_po.row_stats.default(
        x, labels.contiguous(), *_flat(transform), *span, ",".join(outputs), backend
    )


def row_softmax(
    x: Tensor,
    labels: Tensor,
    transform: Transform,
    span: Span,
    outputs: tuple[str, ...],
    out: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Partial statistics (7, N), and the unscaled gradient tile into ``out`` (N, V), or in place where that is None."""
    arguments = (labels.contiguous(), *_flat(transform), *span, ",".join(outputs), backend)
    if out is None:
        return torch.ops.fused_po.row_softmax_.default(x, *arguments)
    return torch.ops.fused_po.row_softmax_into.default(x, out, *arguments)


def row_grad(
    x: Tensor,
    labels: Tensor,
    transform: Transform,
    span: Span,
    anchors: Tensor,
    coefficients: Coefficients,
    out: Tensor | None,
    backend: str | None,
) -> None:
    """``dL/dx`` into ``out`` (N, V), or in place where that is None."""
    arguments = (labels.contiguous(), *_flat(transform), *span, anchors, *coefficients, backend)
    if out is None:
        torch.ops.fused_po.row_grad_.default(x, *arguments)
    else:
        torch.ops.fused_po.row_grad_into.default(x, out, *arguments)


def row_regrad(
    tile: Tensor,
    labels: Tensor,
    transform: Transform,
    span: Span,
    anchors: Tensor,
    coefficients: Coefficients,
    backend: str | None,
) -> None:
    """G = d logp / dx, ``tile`` (N, V), becomes ``dL/dx``: no softcap."""
    temperatures, temperature, _, logit_scale = _flat(transform)
    arguments = (labels.contiguous(), temperatures, temperature, logit_scale, *span, anchors, *coefficients, backend)
    torch.ops.fused_po.row_regrad_.default(tile, *arguments)


def scale(x: Tensor, factor: Tensor) -> None:
    """``x`` times a number (), in place; a factor of 1 costs a look at it, on the device."""
    torch.ops.fused_po.scale_.default(x, factor)


def _flat(transform: Transform) -> tuple[Tensor | None, float, float | None, float]:
    return transform.temperatures, transform.temperature, transform.softcap, transform.logit_scale


def _outputs(names: str) -> tuple[str, ...]:
    return tuple(names.split(","))


@torch.library.custom_op("fused_po::row_stats", mutates_args=())
def _row_stats(
    x: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    start: int,
    stop: int,
    outputs: str,
    backend: str | None,
) -> Tensor:
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    module = select("row_stats", x, backend)
    return module.row_stats(x, labels, transform, Span(start, stop), _outputs(outputs))


@torch.library.custom_op("fused_po::row_softmax_", mutates_args=("x",))
def _row_softmax_(
    x: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    start: int,
    stop: int,
    outputs: str,
    backend: str | None,
) -> Tensor:
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    module = select("row_softmax", x, backend)
    return module.row_softmax(x, labels, transform, Span(start, stop), _outputs(outputs), x)


@torch.library.custom_op("fused_po::row_softmax_into", mutates_args=("out",))
def _row_softmax_into(
    x: Tensor,
    out: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    start: int,
    stop: int,
    outputs: str,
    backend: str | None,
) -> Tensor:
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    module = select("row_softmax", x, backend)
    return module.row_softmax(x, labels, transform, Span(start, stop), _outputs(outputs), out)


@torch.library.custom_op("fused_po::row_grad_", mutates_args=("x",))
def _row_grad_(
    x: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    start: int,
    stop: int,
    anchors: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    l: Tensor | None,  # noqa: E741
    backend: str | None,
) -> None:
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    module = select("row_grad", x, backend)
    module.row_grad(x, labels, transform, Span(start, stop), anchors, Coefficients(c, e, l), x)


@torch.library.custom_op("fused_po::row_grad_into", mutates_args=("out",))
def _row_grad_into(
    x: Tensor,
    out: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    start: int,
    stop: int,
    anchors: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    l: Tensor | None,  # noqa: E741
    backend: str | None,
) -> None:
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    module = select("row_grad", x, backend)
    module.row_grad(x, labels, transform, Span(start, stop), anchors, Coefficients(c, e, l), out)


@torch.library.custom_op("fused_po::row_regrad_", mutates_args=("tile",))
def _row_regrad_(
    tile: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    start: int,
    stop: int,
    anchors: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    l: Tensor | None,  # noqa: E741
    backend: str | None,
) -> None:
    transform = Transform(temperature, temperatures, None, logit_scale)
    module = select("row_regrad", tile, backend, REGRAD_BACKENDS)
    module.row_regrad(tile, labels, transform, Span(start, stop), anchors, Coefficients(c, e, l))


@torch.library.custom_op("fused_po::scale_", mutates_args=("x",))
def _scale_(x: Tensor, factor: Tensor) -> None:
    # not a choice of the user's: the same numbers either way
    name = "triton" if unsupported("triton", "scale", x, SCALE_BACKENDS) is None else "reference"
    select("scale", x, name, SCALE_BACKENDS).scale(x, factor)


@_scale_.register_fake
def _scaled(x: Tensor, factor: Tensor) -> None:
    return None


@_row_stats.register_fake
@_row_softmax_.register_fake
def _partials_like(x: Tensor, *arguments: object) -> Tensor:
    return x.new_empty((len(PARTIALS), x.shape[0]), dtype=accumulation_dtype(x.dtype))


@_row_softmax_into.register_fake
def _partials_like_into(x: Tensor, out: Tensor, *arguments: object) -> Tensor:
    return _partials_like(x)


@_row_grad_.register_fake
@_row_grad_into.register_fake
@_row_regrad_.register_fake
def _nothing(x: Tensor, *arguments: object) -> None:
    return None
