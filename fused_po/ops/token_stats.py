"""``token_stats``: statistics of tokens from logits that exist already, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_po.kernels import library
from fused_po.kernels.contract import ANCHORS, Coefficients, Span, Transform, accumulation_dtype, finish
from fused_po.ops.checks import (
    IGNORE,
    check_labels,
    check_outputs,
    check_scalars,
    refuse_transforms,
    require_floating,
    require_tensors,
    row_temperatures,
    same_device,
)
from fused_po.stats import DIFFERENTIABLE, STATISTICS, Stats

__all__ = ["token_stats"]


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    outputs: Sequence[str] = ("logp",),
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    backend: str | None = None,
) -> Stats:
    """Per-token statistics of ``z = softcap tanh(logit_scale logits / softcap) / T``: one read of the logits.

    ``logp``, ``entropy`` and ``lse`` are differentiable; the backward reads the logits once more and writes their
    gradient.

    Args:
        logits: (B, S, V) or (N, V), floating point, any strides; a slice such as ``logits[:, :-1]`` is not copied.
        labels: (B, S) or (N,) int64, already shifted; -100 is ignored.
        outputs: names from ``Stats``.
        temperature: T > 0, a number, (B,) with (B, S) labels, or the shape of labels.
        softcap: caps logits; None does not.
        logit_scale: multiplies the logits.
        inplace: True lets the backward overwrite the logits with their gradient, which saves a tensor of their size.
            Nothing else may need the logits then.
        backend: ``"cuda"``, ``"triton"``, ``"reference"``, or None for the first that supports the case.

    Returns:
        Statistics in the shape of labels, float32 (float64 for float64), 0 where ignored.

    Raises:
        ValueError: shapes, dtypes, devices, labels or numbers that do not fit.
    """
    refuse_transforms("token_stats")
    check_outputs(outputs)
    require_tensors(logits=logits, labels=labels)
    if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1] or logits.shape[-1] < 1:
        raise ValueError(
            "logits must be (B, S, V) or (N, V) and labels the same without V: "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    require_floating(logits=logits)
    check_scalars(temperature, softcap, logit_scale)
    same_device(logits, labels=labels)
    check_labels(labels, logits.shape[-1])
    temperatures = row_temperatures(temperature, labels, None, accumulation_dtype(logits.dtype))
    number = float(temperature) if temperatures is None else 1.0
    asked = tuple(name for name in STATISTICS if name in outputs)
    *values, _ = torch.ops.fused_po.token_stats.default(
        logits, labels, temperatures, number, softcap, logit_scale, ",".join(asked), inplace, backend
    )
    return Stats(**{n: v != 0 if n == "is_top1" else v for n, v in zip(asked, values, strict=True)})


@torch.library.custom_op("fused_po::token_stats", mutates_args=())
def _token_stats(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: str,
    inplace: bool,
    backend: str | None,
) -> list[Tensor]:
    names, vocab = tuple(outputs.split(",")), logits.shape[-1]
    flat = labels.reshape(-1)
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    partials = [
        library.row_stats(x, flat[rows], _part(transform, rows), Span(0, vocab), names, backend)
        for x, rows in _matrices(logits)
    ]
    stats, anchors = finish(torch.cat(partials, 1), flat, vocab, names)
    keep = flat != IGNORE
    values = stats.present().values()
    shaped = [torch.where(keep, v, torch.zeros_like(v)).to(anchors.dtype).reshape(labels.shape) for v in values]
    return [*shaped, torch.where(keep, anchors, 0.0)]


@_token_stats.register_fake
def _token_stats_fake(logits: Tensor, labels: Tensor, *arguments: Any) -> list[Tensor]:
    outputs = arguments[4]
    dtype = accumulation_dtype(logits.dtype)
    shaped = [logits.new_empty(labels.shape, dtype=dtype) for _ in outputs.split(",")]
    return [*shaped, logits.new_empty((len(ANCHORS), labels.numel()), dtype=dtype)]


@torch.library.custom_op("fused_po::token_stats_backward", mutates_args=())
def _token_stats_backward(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    anchors: Tensor,
    c: Tensor | None,
    e: Tensor | None,
    l: Tensor | None,  # noqa: E741
    backend: str | None,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    transform = Transform(temperature, temperatures, softcap, logit_scale)
    _write_grad(logits, labels, transform, anchors, Coefficients(c, e, l), out, backend)
    return out


@_token_stats_backward.register_fake
def _token_stats_backward_fake(logits: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, labels, temperatures, temperature, softcap, logit_scale, outputs, inplace, backend = inputs
    ctx.set_materialize_grads(False)
    names = outputs.split(",")
    *values, anchors = output
    ctx.save_for_backward(logits, labels, temperatures, anchors)
    ctx.names, ctx.numbers, ctx.inplace, ctx.backend = names, (temperature, softcap, logit_scale), inplace, backend
    constant = [v for name, v in zip(names, values, strict=True) if name not in DIFFERENTIABLE]
    ctx.mark_non_differentiable(*constant, anchors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    logits, labels, temperatures, anchors = ctx.saved_tensors
    temperature, softcap, logit_scale = ctx.numbers
    given = dict(zip(ctx.names, grads[:-1], strict=True))
    triple = Coefficients(*(given.get(name) for name in DIFFERENTIABLE))
    nothing = [None] * 8
    if all(c is None for c in triple):
        return None, *nothing
    if ctx.inplace:
        transform = Transform(temperature, temperatures, softcap, logit_scale)
        _write_grad(logits, labels, transform, anchors, triple, None, ctx.backend)
        return logits, *nothing
    grad = torch.ops.fused_po.token_stats_backward.default(
        logits, labels, temperatures, temperature, softcap, logit_scale, anchors, *triple, ctx.backend
    )
    return grad, *nothing


_token_stats.register_autograd(_backward, setup_context=_setup_context)


def _write_grad(
    logits: Tensor,
    labels: Tensor,
    transform: Transform,
    anchors: Tensor,
    coefficients: Coefficients,
    out: Tensor | None,
    backend: str | None,
) -> None:
    """dL/dlogits into ``out``, or over the logits; matrix by matrix."""
    flat, span = labels.reshape(-1), Span(0, logits.shape[-1])
    triple = Coefficients(*(None if c is None else c.reshape(-1) for c in coefficients))
    for x, rows in _matrices(logits):
        c = Coefficients(*(None if t is None else t[rows].contiguous() for t in triple))
        to = None if out is None else out.view(-1, span.width)[rows]
        library.row_grad(x, flat[rows], _part(transform, rows), span, anchors[:, rows], c, to, backend)


def _part(transform: Transform, rows: slice) -> Transform:
    """The transform of some rows."""
    if transform.temperatures is None:
        return transform
    return replace(transform, temperatures=transform.temperatures[rows])


def _matrices(logits: Tensor) -> list[tuple[Tensor, slice]]:
    """(N, V) views of the logits and the flat rows they stand for; a slice of a batch gives one per sequence, never a
    copy.
    """
    if logits.ndim == 2:
        return [(logits, slice(0, logits.shape[0]))]
    batch, length, vocab = logits.shape
    if logits.is_contiguous() or (batch and logits.stride(0) == length * logits.stride(1)):
        return [(logits.view(batch * length, vocab), slice(0, batch * length))]
    return [(logits[i], slice(i * length, (i + 1) * length)) for i in range(batch)]
