"""What an operator costs, from its schema and the tensors that it takes and gives: FLOP, bytes, launches, waits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Cost", "cost", "footprint", "tensors"]

# (output of the operator, its two factors) by the places of arguments; -1: there is no summand
_PRODUCTS: dict[str, tuple[int, int, int]] = {
    "aten::mm": (-1, 0, 1),
    "aten::bmm": (-1, 0, 1),
    "aten::addmm": (0, 1, 2),
    "aten::addmm_": (0, 1, 2),
    "aten::baddbmm": (0, 1, 2),
    "aten::baddbmm_": (0, 1, 2),
}
# products of blocks, as if all were kept: (result, factors); the second adds to its result
_BLOCK_PRODUCTS = {"fused_po::block_mm": (3, 0, 1, False), "fused_po::block_mm_t": (3, 0, 1, True)}
# memory that nobody fills
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
# memory filled with numbers, in the shape or on the device of an argument that is not read
_FILLED = {
    *("aten::new_zeros", "aten::new_ones", "aten::new_full"),
    *("aten::zeros_like", "aten::ones_like", "aten::full_like"),
}
# they write their first argument without a look at what it holds
_OVERWRITE = {"aten::copy_", "aten::zero_", "aten::fill_", "fused_po::row_softmax_into", "fused_po::row_grad_into"}
# they read as much of their first argument as they return
_PICK = {"aten::index_select", "aten::gather", "aten::index", "aten::embedding"}
# they write as much into their first argument as the last one holds; the second kind reads it too
_PUT = {"aten::index_copy_", "aten::scatter_", "aten::index_put_", "aten::masked_scatter_"}
_ADD_INTO = {"aten::index_add_", "aten::scatter_add_"}
# scans and sorts of CUDA take several kernels, and so does what is built of them; a sum of segments of given lengths
# makes offsets of them first
_LAUNCHES = {
    "aten::cumsum": 2,
    "aten::segment_reduce": 5,
    "aten::_segment_reduce_backward": 6,
    "aten::repeat_interleave": 3,
    "aten::sort": 4,
    "aten::argsort": 4,
    "aten::topk": 3,
    "aten::nonzero": 3,
    "aten::slice_backward": 2,
    "aten::select_backward": 2,
}
# the host needs their result before it can go on
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


class Cost(NamedTuple):
    """See ``operations.Operation``."""

    flops: int = 0
    dtype: torch.dtype | None = None
    traffic: int = 0
    accumulator: int = 0
    launches: int = 1
    waits: int = 0


def footprint(tensor: Tensor) -> int:
    """Bytes that the elements of a tensor take, each counted once however far it is expanded."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def tensors(*values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, lists of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(*value)


def cost(
    func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, device: str
) -> Cost | None:
    """What a device of a type has to do; None: nothing (a view, memory that nobody fills, an operation of the host)."""
    name = func._schema.name
    taken = list(tensors(*args, *kwargs.values()))
    given = list(tensors(result))
    if not any(tensor.device.type == device for tensor in (*taken, *given)):
        return None
    # prim: questions about a tensor, such as its device
    if name in _EMPTY or name.startswith("prim::"):
        return None
    waits = int(name in _WAITS or _chooses_by_mask(name, args) or _returns_to_host(name, taken, given, device))
    if waits:
        return Cost(traffic=sum(map(footprint, taken)), launches=_launches(name, kwargs), waits=waits)
    written = _written(func, args, kwargs)
    if not written and _is_view(taken, given):
        return None
    if name in _PRODUCTS:
        return _product(name, args, kwargs, result)
    if name in _BLOCK_PRODUCTS:
        return _block_product(name, args)
    traffic = _traffic(name, args, taken, given, written)
    return Cost(traffic=traffic, launches=_launches(name, kwargs) if traffic else 0)


def _launches(name: str, kwargs: Mapping[str, Any]) -> int:
    found = _LAUNCHES.get(name, 1)
    # lengths of given offsets are one difference
    return found - 3 if kwargs.get("offsets") is not None else found


def _product(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> Cost:
    summand, left, right = _PRODUCTS[name]
    a, b = args[left], args[right]
    flops = 2 * a.shape[-1] * result.numel()
    traffic, accumulator = footprint(a) + footprint(b), 0
    start = args[summand] if summand >= 0 and kwargs.get("beta", 1) != 0 else None
    if start is not None and footprint(start) == footprint(result):
        accumulator = footprint(start) + footprint(result)
    else:
        traffic += footprint(result) + (0 if start is None else footprint(start))
    return Cost(flops, a.dtype, traffic, accumulator, int(result.numel() > 0))


def _block_product(name: str, args: Sequence[Any]) -> Cost:
    place, left, right, adds = _BLOCK_PRODUCTS[name]
    out, tile, other = args[place], args[left], args[right]
    flops, size = 2 * tile.numel() * out.shape[1], footprint(out)
    operands = footprint(tile) + footprint(other)
    # lists of the kept blocks come first
    if adds:
        return Cost(flops, tile.dtype, operands, 2 * size, 5)
    return Cost(flops, tile.dtype, operands + size, 0, 5)


def _traffic(name: str, args: Sequence[Any], taken: list[Tensor], given: list[Tensor], written: list[Tensor]) -> int:
    if name in _FILLED:
        return sum(map(footprint, given))
    if name in _PICK:
        rest = taken[1:]
        return 2 * sum(map(footprint, given)) + sum(map(footprint, rest))
    if name in _PUT or name in _ADD_INTO:
        places, source = taken[1:-1], taken[-1]
        if len(taken) == 2:
            # a number into each place
            places, source = taken[1:], taken[1]
        touched = source.numel() * taken[0].element_size()
        moved = touched * (2 if name in _ADD_INTO else 1)
        return moved + footprint(source) + sum(map(footprint, places))
    written_only = written if name in _OVERWRITE else []
    read = {id(t): footprint(t) for t in taken if not any(t is other for other in written_only)}
    fresh = {id(t): footprint(t) for t in given if not any(_same(t, other) for other in taken)}
    return sum(read.values()) + sum(fresh.values()) + sum(map(footprint, written))


def _written(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += [tensor for tensor in tensors(value) if not any(tensor is other for other in found)]
    return found


def _is_view(taken: list[Tensor], given: list[Tensor]) -> bool:
    return bool(given) and all(any(_same(tensor, other) for other in taken) for tensor in given)


def _same(one: Tensor, other: Tensor) -> bool:
    """They share their memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _chooses_by_mask(name: str, args: Sequence[Any]) -> bool:
    """Indexing with a mask: how many are chosen has to be known."""
    return name in ("aten::index", "aten::index_put_") and any(t.dtype == torch.bool for t in tensors(args[1]))


def _returns_to_host(name: str, taken: list[Tensor], given: list[Tensor], device: str) -> bool:
    """A copy from the device to the host."""
    if name not in ("aten::_to_copy", "aten::copy_"):
        return False
    source = taken[-1].device.type
    target = given[0].device.type if given else taken[0].device.type
    return source == device and target == "cpu"
