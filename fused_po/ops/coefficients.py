"""From a loss to its coefficients: the only place where losses are differentiated, and torch does it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import Batch, Loss, check_terms, per_token, total
from fused_po.ops.declared import check_pattern, terms_of
from fused_po.splits import Split
from fused_po.stats import Stats

__all__ = ["coefficients", "loss_value", "sided_coefficients", "silent_rows"]


def coefficients(loss: Loss, stats: Stats, batch: Batch, split: Split | None = None) -> tuple[Tensor, Coefficients]:
    """A loss's value and its coefficients (c, e, l) = dL/d(logp, entropy, lse).

    Args:
        loss: any loss.
        stats: packed statistics (N,).
        batch: the same tokens, whole horizons.
        split: scales the coefficients of the terms that have sides; the value stays that of the loss.

    Returns:
        the value, (), in float64, and the coefficients, (N,) each in the dtype of the statistics, None where the loss
        does not differentiate that statistic. Rows that carry no loss have coefficient 0.
    """
    if split is None:
        value, found = _derivatives(lambda terms: terms, loss, stats, batch)
        if "logp" in found:
            check_pattern(loss, found["logp"], stats, batch)
        return value, Coefficients(**{name: _narrowed(c, getattr(stats, name).dtype) for name, c in found.items()})
    assert stats.logp is not None
    value = stats.logp.new_zeros((), dtype=torch.float64)
    summed: dict[str, Tensor] = {}
    for factor, part in loss.parts:
        seen: set[str] = set()
        rest_value, rest = _derivatives(partial(_terms, part.sided, False, seen), part, stats, batch)
        sided_value, sided = _derivatives(partial(_terms, part.sided, True, seen), part, stats, batch)
        check_terms(part, seen)
        c = sided["logp"]
        role = per_token(part.role(batch), batch, "role", part)
        sided["logp"] = split(c, role, per_token(part.weight(c, batch), batch, "weight", part), batch, part)
        value = value + factor * (rest_value + sided_value)
        for name in sided:
            summed[name] = summed.get(name, 0.0) + factor * (sided[name] + rest[name])
    return value, Coefficients(**{name: _narrowed(c, stats.logp.dtype) for name, c in summed.items()})


def loss_value(loss: Loss, stats: Stats, batch: Batch) -> Tensor:
    """The value alone, (), float64: without derivatives it also runs in inference mode."""
    return total(terms_of(loss, stats, batch)).double()


def sided_coefficients(loss: Loss, stats: Stats, batch: Batch) -> Tensor:
    """dL/dlogp (N,) float64 of the terms that have sides, before any split."""
    found = torch.zeros_like(batch.token_lengths, dtype=torch.float64)
    for factor, part in loss.parts:
        _, sided = _derivatives(partial(_terms, part.sided, True, set()), part, stats, batch)
        found = found + factor * sided["logp"]
    return found


def silent_rows(loss: Loss, batch: Batch, split: Split | None = None) -> Tensor | None:
    """(N,) bool, rows whose coefficients are exactly 0 whatever the policy says; None where none is known.

    Args:
        loss: any loss.
        batch: the whole call.
        split: the split of the call.
    """
    found = None
    for _, part in loss.parts:
        masks = [part.silent(batch)]
        if split is not None and not part.has_unsided_terms:
            masks.append(split.silent(per_token(part.role(batch), batch, "role", part)))
        known = [mask for mask in masks if mask is not None]
        if not known:
            return None
        silent = torch.stack(known).any(0)
        found = silent if found is None else found & silent
    return found


def _terms(sided: frozenset[str], wanted: bool, seen: set[str], terms: dict[str, Tensor]) -> dict[str, Tensor]:
    # what is written outside can't be traced
    if not torch.compiler.is_compiling():
        seen.update(terms)
    return {name: term for name, term in terms.items() if (name in sided) == wanted}


def _derivatives(
    select: Callable[[dict[str, Tensor]], dict[str, Tensor]], loss: Loss, stats: Stats, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the selected terms, and its derivatives in the statistics that the loss differentiates.

    Both in float64: where a loss reads a statistic twice, large parts of its derivative that cancel must not be rounded
    before they meet.
    """

    def value(inputs: dict[str, Tensor]) -> Tensor:
        terms = select(terms_of(loss, replace(stats, **inputs), batch))
        # no term: zero, and connected to the inputs
        return total(terms or {name: 0.0 * field.double().sum() for name, field in inputs.items()})

    inputs = {name: getattr(stats, name).double() for name in loss.differentiates}
    if torch.compiler.is_compiling():
        # traces inside an autograd.Function, which torch.autograd.grad does not
        gradients, result = torch.func.grad_and_value(value)(inputs)
        return result, gradients
    # the caller may offload or checkpoint saved tensors: not these, and torch.func refuses such hooks
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    unhooked = torch.autograd.graph.saved_tensors_hooks(_same, _same) if hooked else nullcontext()
    with torch.enable_grad(), unhooked:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        result = value(leaves)
        found = torch.autograd.grad(result, list(leaves.values()), materialize_grads=True)
    return result.detach(), dict(zip(leaves, found, strict=True))


def _narrowed(c: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, at most its largest number: infinity times the 0 of a gradient tile is NaN."""
    largest = torch.finfo(dtype).max
    return c.clamp(-largest, largest).to(dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor
