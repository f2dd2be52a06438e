"""Products of kept blocks in plain PyTorch: each row decides for itself, and a block's rows are gathered."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["GROUP", "WIDTH", "block_mm", "block_mm_t", "unsupported"]

GROUP, WIDTH = 1, 256


def unsupported(kernel: str, tile: Tensor) -> str | None:
    """The reference runs everything."""
    return None


def block_mm(tile: Tensor, weight: Tensor, kept: Tensor, out: Tensor) -> None:
    """``out`` (R, H) <- kept blocks of tile times weight, see ``blocks``."""
    out.zero_()
    for rows, columns in _kept(kept, tile.shape[1]):
        part = _operand(tile[:, columns] if rows is None else tile[rows, columns], tile, out)
        product = part @ _operand(weight[columns], tile, out)
        if rows is None:
            out += product
        else:
            out.index_add_(0, rows, product)


def block_mm_t(tile: Tensor, rows: Tensor, kept: Tensor, out: Tensor) -> None:
    """``out`` (V, H) += (kept blocks of tile)^T times rows, see ``blocks``."""
    for some, columns in _kept(kept, tile.shape[1]):
        part = _operand(tile[:, columns] if some is None else tile[some, columns], tile, out)
        out[columns].addmm_(part.t(), _operand(rows if some is None else rows[some], tile, out))


def _kept(kept: Tensor, vocab: int) -> Iterator[tuple[Tensor | None, slice]]:
    """Columns that take part and the rows (A,) that take them, None for all; blocks that all rows keep go together."""
    counts = kept.sum(0).tolist()
    first = 0
    while first < len(counts):
        last = first + 1
        if counts[first] == kept.shape[0]:
            while last < len(counts) and counts[last] == kept.shape[0]:
                last += 1
        if counts[first]:
            rows = None if counts[first] == kept.shape[0] else kept[:, first].nonzero().squeeze(1)
            yield rows, slice(first * WIDTH, min(last * WIDTH, vocab))
        first = last


def _operand(values: Tensor, tile: Tensor, out: Tensor) -> Tensor:
    """Rounded to the dtype of the tile, in that of the product."""
    return values.to(tile.dtype).to(out.dtype)
