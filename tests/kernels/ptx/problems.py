"""Random problems for the machine, and the check of a backend against float64 on all three kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_po.kernels.contract import Coefficients, Span, Transform, finish
from fused_po.stats import STATISTICS
from fused_po.testing import KernelProblem
from tests.kernels.test_rows import check, plain, plain_grad

__all__ = ["FLOATS", "problem", "run_grad", "run_softmax", "run_stats"]

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LABEL_IGNORED = -100


def problem(
    seed: int,
    element: str,
    softcap: bool,
    *,
    temperatures: bool | None = None,
    width: int | None = None,
    aligned: bool | None = None,
) -> tuple[KernelProblem, Tensor]:
    """Rows that a seed draws: their number, width, alignment, padding, peaks, masked classes; one may be ignored.

    Returns:
        the problem, and the rows that are not ignored.
    """
    random = np.random.default_rng(seed)
    rows = int(random.integers(5, 9))
    width = int(random.integers(1, 1200)) if width is None else width
    padding = int(random.choice([0, 0, 5]))
    aligned = bool(random.random() < 0.5) if aligned is None else aligned
    stride = width + padding + int(random.integers(0, 9))
    stride, offset = (stride + -stride % 16, 0) if aligned else (stride | 1, int(random.integers(0, 8)))
    memory = torch.full((rows, stride + 8), torch.nan, dtype=FLOATS[element])[:, : stride + 8]
    memory = memory.flatten()[: rows * stride + 8].clone()
    x = memory[offset:].as_strided((rows, width + padding), (stride, 1))
    values = random.choice([0.5, 3.0]) * random.standard_normal((rows, width))
    labels = random.integers(0, width, rows)
    values[np.arange(rows), labels] += random.choice([0.0, 6.0, 18.0])
    if random.random() < 0.3:
        masked = random.random((rows, width)) < 0.5
        masked[np.arange(rows), labels] = False
        values[masked] = -np.inf
    x[:, :width] = torch.from_numpy(values)
    given = torch.from_numpy(labels)
    if random.random() < 0.3:
        given[int(random.integers(0, rows))] = LABEL_IGNORED
    with_temperatures = bool(random.random() < 0.5) if temperatures is None else temperatures
    transform = Transform(
        float(random.choice([1.0, 0.7])),
        torch.from_numpy(random.uniform(0.5, 1.5, rows).astype(np.float32)) if with_temperatures else None,
        15.0 if softcap else None,
        float(random.choice([1.0, 1.5])),
    )
    return KernelProblem(x, given, transform, width), (given >= 0).nonzero().squeeze(1)


def _kept(p: KernelProblem, rows: Tensor) -> KernelProblem:
    temperatures = p.transform.temperatures
    transform = replace(p.transform, temperatures=None if temperatures is None else temperatures[rows])
    return KernelProblem(p.x[rows], p.labels[rows], transform, p.vocab_size)


def _check_statistics(partials: Tensor, p: KernelProblem, rows: Tensor, outputs: tuple[str, ...]) -> Tensor:
    stats, anchors = finish(partials, p.labels, p.vocab_size, outputs)
    kept = _kept(p, rows)
    truth, naive = plain(kept, torch.float64)[1], plain(kept, torch.float32)[1]
    for name, value in stats.present().items():
        if name == "is_top1":
            assert torch.equal(value[rows], truth.is_top1)
        else:
            check(value[rows], getattr(naive, name).detach(), getattr(truth, name).detach(), name)
    return anchors


def _check_gradient(out: Tensor, p: KernelProblem, rows: Tensor, triple: Coefficients, what: str) -> None:
    kept = _kept(p, rows)
    chosen = [Coefficients(*(None if c is None else c[rows].to(d) for c in triple)) for d in (torch.float32,) * 2]
    truth = plain_grad(kept, torch.float64, chosen[0])
    naive = plain_grad(kept, torch.float32, chosen[1])
    check(out[rows, : p.vocab_size], naive.to(out.dtype), truth, what)
    # padding and ignored rows have no gradient
    ignored = torch.ones(len(out), dtype=torch.bool)
    ignored[rows] = False
    assert (out[:, p.vocab_size :] == 0).all() and (out[ignored] == 0).all()


def _outputs(p: KernelProblem, element: str, seed: int) -> Tensor:
    """Memory for a gradient, of another alignment than the logits; in place where the seed and dtype say so."""
    dtype = FLOATS[element]
    if dtype == p.x.dtype and seed % 2:
        return p.x
    rows, columns = p.x.shape
    stride = columns + (seed % 3) * 4
    memory = torch.full((rows * stride + 8,), torch.nan, dtype=dtype)
    return memory[seed % 5 :].as_strided((rows, columns), (stride, 1))


def run_stats(backend: Any, p: KernelProblem, rows: Tensor, outputs: tuple[str, ...] = STATISTICS) -> None:
    partials = backend.row_stats(p.x, p.labels, p.transform, Span(0, p.vocab_size), outputs)
    _check_statistics(partials, p, rows, outputs)


def run_softmax(
    backend: Any, p: KernelProblem, rows: Tensor, outputs: tuple[str, ...], element: str, seed: int
) -> None:
    before = replace(p, x=p.x.clone())
    out = _outputs(p, element, seed)
    partials = backend.row_softmax(p.x, p.labels, p.transform, Span(0, p.vocab_size), outputs, out)
    _check_statistics(partials, before, rows, outputs)
    ones = Coefficients(torch.ones(len(p.x)))
    _check_gradient(out, before, rows, ones, "G")


def run_grad(backend: Any, p: KernelProblem, rows: Tensor, which: str, element: str, seed: int) -> None:
    """``which`` of the coefficients c, e and l there are."""
    before = replace(p, x=p.x.clone())
    span = Span(0, p.vocab_size)
    # its own: what one function makes of tanh is not what another does, to the last bit
    partials = backend.row_stats(p.x, p.labels, p.transform, span, STATISTICS)
    _, anchors = finish(partials, p.labels, p.vocab_size, STATISTICS)
    values = torch.randn(3, len(p.x), generator=torch.Generator().manual_seed(seed))
    triple = Coefficients(*(v if name in which else None for name, v in zip("cel", values, strict=True)))
    out = _outputs(p, element, seed)
    backend.row_grad(p.x, p.labels, p.transform, span, anchors, triple, out)
    _check_gradient(out, before, rows, triple, "dL/dx")
