"""The language-model head: its three GEMMs, the dtypes they run in, and the transform behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.distributed import Shard
from fused_po.kernels.blocks import block_mm, block_mm_t, choose
from fused_po.kernels.contract import Span, Transform, accumulation_dtype
from fused_po.ops.devices import stands_for

__all__ = ["Head", "compute_dtype"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Head:
    """``x = h W^T + b`` and what turns x into logits.

    Operands are rounded to the compute dtype, products accumulate and come out in the accumulation dtype (float32, or
    float64 for float64): on a GPU through ``out_dtype``, on a CPU by widening the rounded operands. A weight that is
    stored in another dtype is cast slice by slice of the vocabulary, never as a whole.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        compute_dtype: dtype of the GEMM operands and of gradient tiles.
        slice_bytes: bound on the memory of one cast slice of the weight.
        backend: requested kernel backend.
        max_dropped_mass: share of a row's gradient that GEMM 2 and 3 may leave out.
        shard: this rank's classes, where the vocabulary is sharded; None: it is not.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    compute_dtype: torch.dtype
    temperature: float
    softcap: float | None
    logit_scale: float
    slice_bytes: int
    backend: str | None
    max_dropped_mass: float = 0.0
    shard: Shard | None = None

    @property
    def columns(self) -> int:
        """Width of a tile: the rows of the weight."""
        return self.weight.shape[0]

    @property
    def classes(self) -> int:
        """Of the whole vocabulary."""
        return self.columns if self.shard is None else self.shard.classes

    @property
    def span(self) -> Span:
        """The classes that the columns stand for."""
        return Span(0, self.columns) if self.shard is None else self.shard.span

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.compute_dtype)

    def transform(self, temperatures: Tensor | None) -> Transform:
        """The logit transform of rows with these temperatures (R,)."""
        return Transform(self.temperature, temperatures, self.softcap, self.logit_scale)

    def logits_into(self, out: Tensor, hidden: Tensor) -> None:
        """GEMM 1: ``out`` (R, V) <- hidden (R, H) W^T + b, in the accumulation dtype."""
        hidden = self._operand(hidden)
        for columns, weight in self._slices(hidden.shape[0]):
            self._matmul_into(out[:, columns], hidden, weight.t())
        if self.bias is not None:
            out.add_(self.bias)

    def kept_blocks(self, tile: Tensor) -> Tensor | None:
        """Which blocks of a gradient tile (R, V) count, see ``kernels.blocks``; None: all."""
        return choose(tile, self.max_dropped_mass, self.backend) if self.max_dropped_mass else None

    def hidden_grad(self, tile: Tensor, kept: Tensor | None = None) -> Tensor:
        """GEMM 2: tile (R, V) W -> (R, H) in the accumulation dtype, over the whole vocabulary."""
        product = self._product(tile) if kept is None else self._kept_product(tile, kept)
        return product if self.shard is None else self.shard.summed(product)

    def _kept_product(self, tile: Tensor, kept: Tensor) -> Tensor:
        return block_mm(tile, self.weight, kept, self.accumulation_dtype, self.backend)

    def _product(self, tile: Tensor) -> Tensor:
        result: Tensor | None = None
        for columns, weight in self._slices(tile.shape[0]):
            operand = self._operand(tile[:, columns])
            if result is None:
                result = tile.new_empty((tile.shape[0], weight.shape[1]), dtype=self.accumulation_dtype)
                self._matmul_into(result, operand, weight)
            else:
                self._matmul_add(result, operand, weight)
        assert result is not None
        return result

    def add_weight_grad(self, grad: Tensor, tile: Tensor, rows: Tensor, kept: Tensor | None = None) -> None:
        """GEMM 3: grad (V, H) += tile^T (V, R) rows (R, H), in the accumulation dtype."""
        if kept is not None:
            block_mm_t(tile, rows.to(self.compute_dtype), kept, grad, self.backend)
            return
        rows = self._operand(rows)
        for columns in self._columns(self._math_dtype != tile.dtype, tile.shape[0]):
            self._matmul_add(grad[columns], self._operand(tile[:, columns]).t(), rows)

    def add_bias_grad(self, grad: Tensor, tile: Tensor, coefficient: Tensor | None) -> None:
        """grad (V,) += tile^T coefficient, with coefficient (R,) or all ones."""
        for columns in self._columns(grad.dtype != tile.dtype, tile.shape[0]):
            part = tile[:, columns].to(grad.dtype)
            if coefficient is None:
                grad[columns] += part.sum(0)
            else:
                grad[columns].addmv_(part.t(), coefficient)

    @property
    def _math_dtype(self) -> torch.dtype:
        """The dtype of the operands as the BLAS sees them: CPUs have no half-precision product with a wide result."""
        on_cpu = self.weight.device.type == "cpu"
        return torch.float32 if on_cpu and self.compute_dtype in _HALF else self.compute_dtype

    def _operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.compute_dtype).to(self._math_dtype)

    def _slices(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the dtype of the product, cast slice by slice where it is stored in another; ``rows`` go
        through it.
        """
        casts = self.weight.dtype != self.compute_dtype or self.compute_dtype != self._math_dtype
        for columns in self._columns(casts, rows):
            yield columns, self._operand(self.weight[columns])

    def _columns(self, casts: bool, rows: int) -> Iterator[slice]:
        """Slices of the vocabulary whose weight, and whose columns of ``rows``, are within ``slice_bytes``."""
        vocab, width = self.weight.shape
        step = vocab
        if casts:
            step = min(vocab, max(1, self.slice_bytes // (4 * max(1, width, rows))))
        for first in range(0, vocab, step):
            yield slice(first, min(first + step, vocab))

    def _matmul_into(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if not out.is_contiguous():
            # a slice of columns: BLAS writes whole rows
            part = out.new_empty(out.shape)
            self._matmul_into(part, a, b)
            out.copy_(part)
        elif a.dtype != out.dtype:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        else:
            torch.mm(a, b, out=out)

    def _matmul_add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype != out.dtype:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            out.addmm_(a, b)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of GEMM operands: that of autocast where it is on, else that of the hidden states."""
    device = stands_for(hidden)
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
