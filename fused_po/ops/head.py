"""The language-model head: its three GEMMs, the dtypes they run in, and the transform behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    Operands are rounded to the compute dtype, products accumulate in the accumulation dtype (float32, or float64 for
    float64) and come out in it or in that of the tensor they are written to: on a GPU through ``out_dtype``, on a CPU
    by widening the rounded operands. Each method works on a slice of the vocabulary, ``columns`` of a tile.

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

    def span(self, columns: slice) -> Span:
        """The classes that some columns stand for; those behind ``stop`` are padding."""
        whole = Span(0, self.columns) if self.shard is None else self.shard.span
        first = min(whole.start + columns.start, whole.stop)
        return Span(first, min(whole.start + columns.stop, whole.stop))

    @property
    def accumulation_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.compute_dtype)

    @property
    def casts(self) -> bool:
        """The weight is stored in another dtype than the products take."""
        return self.weight.dtype != self._math_dtype

    @property
    def copies(self) -> bool:
        """A copy of the weight in the compute dtype would spare casts: not where products widen their operands."""
        return self.weight.dtype != self.compute_dtype == self._math_dtype

    def copied(self, copy: Tensor | None = None) -> Head:
        """The head with its weight cast once and as a whole, where that spares casts; ``copy``: made before."""
        if copy is None:
            copy = self.weight.to(self.compute_dtype) if self.copies else self.weight
        return replace(self, weight=copy)

    def transform(self, temperatures: Tensor | None) -> Transform:
        """The logit transform of rows with these temperatures (R,)."""
        return Transform(self.temperature, temperatures, self.softcap, self.logit_scale)

    def every(self) -> slice:
        """All columns."""
        return slice(0, self.columns)

    def logits_into(self, out: Tensor, hidden: Tensor, columns: slice) -> None:
        """GEMM 1: ``out`` (R, columns) <- hidden (R, H) W^T + b, in the accumulation dtype."""
        hidden = self._operand(hidden)
        for part, weight in self._slices(columns, hidden.shape[0]):
            self._product_into(_of(out, part, columns), hidden, weight.t())
        if self.bias is not None:
            out.add_(self.bias[columns])

    def kept_blocks(self, tile: Tensor) -> Tensor | None:
        """Which blocks of a gradient tile (R, v) count, see ``kernels.blocks``; None: all."""
        return choose(tile, self.max_dropped_mass, self.backend) if self.max_dropped_mass else None

    def hidden_grad(
        self, out: Tensor | None, tile: Tensor, columns: slice, kept: Tensor | None = None, into: Tensor | None = None
    ) -> Tensor:
        """GEMM 2: ``out`` + tile (R, columns) W -> (R, H) in the accumulation dtype; ``out``, which is written to, None
        starts at 0, in ``into`` where that is given.
        """
        if kept is not None:
            product = block_mm(tile, self.weight[columns], kept, self.accumulation_dtype, self.backend)
            return product if out is None else out.add_(product)
        for part, weight in self._slices(columns, tile.shape[0]):
            operand = self._operand(_of(tile, part, columns))
            if out is None:
                shape = (tile.shape[0], weight.shape[1])
                out = tile.new_empty(shape, dtype=self.accumulation_dtype) if into is None else into
                self._product_into(out, operand, weight)
            else:
                self._add_product(out, operand, weight)
        assert out is not None
        return out

    def weight_grad(self, out: Tensor, tile: Tensor, rows: Tensor, *, add: bool, kept: Tensor | None = None) -> None:
        """GEMM 3: ``out`` (v, H) <- or += tile^T (v, R) rows (R, H).

        Args:
            out: in the accumulation dtype, or, where nothing is added, in the compute dtype.
            kept: blocks of the tile that count; None: all. Only together with ``add``.
        """
        if kept is not None:
            block_mm_t(tile, rows.to(self.compute_dtype), kept, out, self.backend)
            return
        rows = self._operand(rows)
        for part in self._steps(slice(0, tile.shape[1]), tile.dtype != self._math_dtype, tile.shape[0]):
            operand = self._operand(tile[:, part]).t()
            if add:
                self._add_product(out[part], operand, rows)
            else:
                self._product_into(out[part], operand, rows)

    def bias_grad(self, out: Tensor, tile: Tensor, coefficient: Tensor | None) -> None:
        """``out`` (v,) += tile^T (v, R) coefficient, with coefficient (R,) or all ones."""
        for part in self._steps(slice(0, tile.shape[1]), out.dtype != tile.dtype, tile.shape[0]):
            operand = tile[:, part].to(out.dtype)
            if coefficient is None:
                out[part] += operand.sum(0)
            else:
                out[part].addmv_(operand.t(), coefficient)

    @property
    def _math_dtype(self) -> torch.dtype:
        """The dtype of the operands as the BLAS sees them: CPUs have no half-precision product with a wide result."""
        on_cpu = self.weight.device.type == "cpu"
        return torch.float32 if on_cpu and self.compute_dtype in _HALF else self.compute_dtype

    def _operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.compute_dtype).to(self._math_dtype)

    def _slices(self, columns: slice, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns and their weight in the dtype of the product, cast slice by slice where it is stored in another;
        ``rows`` go through it.
        """
        for part in self._steps(columns, self.casts, rows):
            yield part, self._operand(self.weight[part])

    def _steps(self, columns: slice, casts: bool, rows: int) -> Iterator[slice]:
        """Slices of columns whose weight, and whose part of ``rows``, are within ``slice_bytes``."""
        step = columns.stop - columns.start
        if casts:
            step = min(step, max(1, self.slice_bytes // (4 * max(1, self.weight.shape[1], rows))))
        for first in range(columns.start, columns.stop, max(1, step)):
            yield slice(first, min(first + step, columns.stop))

    def _product_into(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype != out.dtype and a.dtype != self.compute_dtype:
            # operands that were widened for their product
            out.copy_(a @ b)
        elif torch.compiler.is_compiling():
            # a trace takes no ``out`` with strides
            out.copy_(a @ b if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype))
        elif a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)

    def _add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == out.dtype:
            out.addmm_(a, b)
        elif torch.compiler.is_compiling():
            # neither torch 2.11 nor 2.13 lowers addmm with an out_dtype
            out.add_(torch.mm(a, b, out_dtype=out.dtype))
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)


def _of(tile: Tensor, part: slice, columns: slice) -> Tensor:
    """The part of a tile of ``columns`` that holds the columns ``part``."""
    return tile[:, part.start - columns.start : part.stop - columns.start]


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of GEMM operands: that of autocast where it is on, else that of the hidden states."""
    device = stands_for(hidden)
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype
