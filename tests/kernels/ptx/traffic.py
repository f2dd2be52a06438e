"""Instructions that move data between memory, registers and threads, or that threads meet at: calls of the machine."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.kernels.ptx.instructions import COMPUTING, Unknown, set_register
from tests.kernels.ptx.parse import Immediate, Instruction, Memory, Operand, Register, Symbol, Vector
from tests.kernels.ptx.translate import VIEWS, Writer, kind_of

__all__ = ["emit"]

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param")


def emit(w: Writer, i: Instruction) -> str | None:
    """Write one instruction; the last of a block may have a result for the machine."""
    name = i.op[0]
    if name in COMPUTING:
        COMPUTING[name](w, i)
        return None
    if name not in MOVING:
        raise Unknown(f"{w.kernel.name}: {i.text}")
    return MOVING[name](w, i)


def _space(i: Instruction) -> str:
    found = next((name for name in i.op if name in SPACES), None)
    if found is None:
        raise Unknown(f"the generic address space: {i.text}")
    return found


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _element(i: Instruction) -> tuple[str, int, str]:
    """Type, bytes and dtype in memory of an access."""
    ptx_type = i.op[-1]
    size = int(ptx_type.lstrip("bfsu")) // 8
    return ptx_type, size, "U1" if size == 1 else VIEWS["u"][size]


def _mask(w: Writer, i: Instruction) -> str:
    return w.guard(i) or "None"


def _load(w: Writer, i: Instruction) -> None:
    to, source = i.operands
    ptx_type, size, dtype = _element(i)
    parts = _parts(to)
    space = _space(i)
    found = w.temporary()
    if space == "param":
        assert isinstance(source, Memory)
        if isinstance(source.base, Symbol):
            place = str(w.address_of(source.base.name) + source.offset)
        else:
            place = f"M.same({w.address(source)})"
        w.line(f"{found} = M.parameters({place}, {dtype}, {len(parts)}, n)")
    else:
        call = {"global": "load_global", "shared::cluster": "load_peer"}.get(space, "load_shared")
        address = w.address(source)
        w.line(f"{found} = M.{call}({address}, {size * len(parts)}, {dtype}, {_mask(w, i)}, I)")
    for number, operand in enumerate(parts):
        value = f"{found}[{number}]"
        if ptx_type[0] == "s":
            value = f"{value}.view({'np.int8' if size == 1 else VIEWS['s'][size]})"
        elif ptx_type[0] == "f" and kind_of(ptx_type)[0] == "f":
            value = f"{value}.view({VIEWS['f'][size]})"
        set_register(w, i, operand, ptx_type if ptx_type[0] in "sf" and size > 2 else f"b{8 * size}", value)


def _store(w: Writer, i: Instruction) -> None:
    to, source = i.operands
    _, size, dtype = _element(i)
    values = [w.read(part, f"b{8 * max(size, 2)}") for part in _parts(source)]
    if size == 1:
        values = [f"{text}.astype(U1)" for text in values]
    call = "store_global" if _space(i) == "global" else "store_shared"
    if _space(i) == "shared::cluster":
        raise Unknown(i.text)
    w.line(f"M.{call}({w.address(to)}, [{', '.join(values)}], {dtype}, {_mask(w, i)}, I)")


def _mapa(w: Writer, i: Instruction) -> None:
    address, rank = (w.read(operand, "u32") for operand in i.operands[1:])
    set_register(w, i, i.operands[0], "b32", f"M.peer_address({address}, {rank}, I)")


def _shuffle(w: Writer, i: Instruction) -> None:
    to, value, lane, clamp, members = i.operands
    results = _parts(to)
    found = w.temporary()
    given = ", ".join([w.read(value, "b32"), w.read(lane, "u32"), w.read(clamp, "u32"), w.read(members, "u32")])
    w.line(f"{found} = M.shuffle({i.op[2]!r}, {given}, {_mask(w, i)}, I)")
    set_register(w, i, results[0], "b32", f"{found}[0]")
    if len(results) > 1:
        set_register(w, i, results[1], "pred", f"{found}[1]")


def _reduce(w: Writer, i: Instruction) -> None:
    """redux.sync"""
    _unguarded(w, i)
    function = {"min": "fmin", "max": "fmax", "add": "add", "and": "bitwise_and", "or": "bitwise_or"}[i.op[2]]
    function = function[1:] + "imum" if "NaN" in i.op else function
    value = w.read(i.operands[1], i.op[-1])
    value = f"np.abs({value})" if "abs" in i.op else value
    members = w.read(i.operands[2], "u32")
    set_register(w, i, i.operands[0], i.op[-1], f"M.reduce(np.{function}, {value}, {members}, I)")


def _branch(w: Writer, i: Instruction) -> str | None:
    return w.guard(i)


def _unguarded(w: Writer, i: Instruction) -> None:
    if i.guard is not None:
        raise Unknown(f"a guard at {i.text}")


def _bar(w: Writer, i: Instruction) -> str | None:
    _unguarded(w, i)
    if i.op[1] == "warp":
        w.line("M.whole_warps(I)")
        return None
    if i.op[1] == "cluster" or (i.op[0] == "barrier" and i.op[1] == "cluster"):
        return None
    if i.op[1] != "sync":
        raise Unknown(i.text)
    numbers = [operand.value for operand in i.operands if isinstance(operand, Immediate)]
    if len(numbers) != len(i.operands):
        raise Unknown(i.text)
    return f"{(*numbers, 0)[:2]}"


def _mbarrier(w: Writer, i: Instruction) -> str | None:
    if i.op[1] == "init":
        address, count = i.operands
        w.line(f"M.mbarrier_init({w.address(address)}, {w.read(count, 'u32')}, {_mask(w, i)}, I)")
        return None
    if i.op[1] in ("try_wait", "test_wait"):
        _unguarded(w, i)
        if "parity" not in i.op:
            raise Unknown(i.text)
        return f"({w.address(i.operands[1])}, {w.read(i.operands[2], 'u32')})"
    if i.op[1] == "inval":
        w.line(f"M.mbarrier_invalidate({w.address(i.operands[0])}, {_mask(w, i)}, I)")
        return None
    if i.op[1] == "arrive" and i.operands[0] == Symbol("_"):
        address, *rest = i.operands[1:]
        given = w.read(rest[0], "u32") if rest else "U4(1)"
        count, size = ("U4(1)", given) if "expect_tx" in i.op else (given, "U4(0)")
        w.line(f"M.mbarrier_arrive({w.address(address)}, {count}, {size}, {_mask(w, i)}, I)")
        return None
    raise Unknown(i.text)


def _fence(w: Writer, i: Instruction) -> None:
    _unguarded(w, i)
    if i.op[1:3] == ("proxy", "async"):
        w.line("M.fence_proxy(I)")


def _copy(w: Writer, i: Instruction) -> None:
    if i.op[1] != "async":
        raise Unknown(i.text)
    if i.op[2] == "bulk":
        form = ("shared::cluster", "global", "mbarrier::complete_tx::bytes")
        if i.op[3:] != form and i.op[3:] != ("shared::cta", *form[1:]):
            raise Unknown(i.text)
        to, source, size, barrier = i.operands
        given = f"{w.address(to)}, {w.address(source)}, {w.read(size, 'u32')}, {w.address(barrier)}"
        w.line(f"M.bulk_copy({given}, {_mask(w, i)}, I)")
        return
    if i.op[2] == "commit_group":
        w.line("M.commit_copies(I)")
        return
    if i.op[2] in ("wait_group", "wait_all"):
        count = i.operands[0].value if i.op[2] == "wait_group" and isinstance(i.operands[0], Immediate) else None
        w.line(f"M.wait_for_copies({count}, I)")
        return
    if i.op[3:] != ("shared", "global"):
        raise Unknown(i.text)
    to, source, size, *rest = i.operands
    assert isinstance(size, Immediate)
    taken = w.read(rest[0], "u32") if rest else f"U4({size.value})"
    w.line(f"M.copy({w.address(to)}, {w.address(source)}, {size.value}, {taken}, {_mask(w, i)}, I)")


def _trap(w: Writer, i: Instruction) -> None:
    w.line(f"M.trap({_mask(w, i)}, I)")


def _product(w: Writer, i: Instruction) -> None:
    """wgmma, see `products`."""
    _unguarded(w, i)
    if i.op[1] == "fence":
        return
    if i.op[1] == "commit_group":
        w.line("M.commit_products(I)")
        return
    if i.op[1] == "wait_group":
        assert isinstance(i.operands[0], Immediate)
        w.line(f"M.wait_for_products({i.operands[0].value}, I)")
        return
    sums = _parts(i.operands[0])
    first, second, add, *numbers = i.operands[1:]
    shape = re.fullmatch(r"m64n(\d+)k16", i.op[4])
    flags = [number.value for number in numbers if isinstance(number, Immediate)]
    kind = i.op[6]
    if not shape or flags[:2] != [1, 1] or i.op[5] != "f32" or kind not in ("bf16", "f16") or len(flags) != 4:
        raise Unknown(i.text)
    slots = [operand.slot for operand in sums if isinstance(operand, Register)]
    before = ", ".join(w.read(operand, "f32") for operand in sums)
    found = w.temporary()
    given = f"{w.read(first, 'b64')}, {w.read(second, 'b64')}, {w.read(add, 'pred')}"
    turned = (bool(flags[2]), bool(flags[3]))
    w.line(f"{found} = M.multiply({shape[1]}, {kind!r}, {slots}, [{before}], {given}, {turned}, I)")
    for number, operand in enumerate(sums):
        w.write(operand, "f32", f"{found}[{number}]")


def _matrices(w: Writer, i: Instruction) -> None:
    """ldmatrix and stmatrix."""
    _unguarded(w, i)
    place = 1 if i.op[0] == "ldmatrix" else 0
    registers, address = _parts(i.operands[1 - place]), w.address(i.operands[place])
    if "m8n8" not in i.op or "b16" not in i.op:
        raise Unknown(i.text)
    turned = "trans" in i.op
    if place == 0:
        values = ", ".join(w.read(operand, "b32") for operand in registers)
        w.line(f"M.store_matrices({address}, [{values}], {turned}, I)")
        return
    found = w.temporary()
    w.line(f"{found} = M.load_matrices({address}, {len(registers)}, {turned}, I)")
    for number, operand in enumerate(registers):
        set_register(w, i, operand, "b32", f"{found}[{number}]")


MOVING: dict[str, Callable[[Writer, Instruction], str | None]] = {
    "ld": _load,
    "st": _store,
    "mapa": _mapa,
    "shfl": _shuffle,
    "bra": _branch,
    "bar": _bar,
    "barrier": _bar,
    "mbarrier": _mbarrier,
    "fence": _fence,
    "membar": _fence,
    "cp": _copy,
    "trap": _trap,
    "redux": _reduce,
    "wgmma": _product,
    "ldmatrix": _matrices,
    "stmatrix": _matrices,
    "ret": _unguarded,
    "exit": _unguarded,
}
