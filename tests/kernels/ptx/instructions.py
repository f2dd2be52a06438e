"""What each instruction that only computes means, as a numpy expression."""

from __future__ import annotations

from collections.abc import Callable

from tests.kernels.ptx.parse import Immediate, Instruction, Operand, Register, Symbol, Vector
from tests.kernels.ptx.translate import VIEWS, Writer, kind_of

__all__ = ["COMPUTING", "Unknown", "set_register"]

COMPARE = {
    **{name: f"{{a}} {sign} {{b}}" for name, sign in (("eq", "=="), ("lt", "<"), ("le", "<="), ("gt", ">"))},
    "ge": "{a} >= {b}",
    "lo": "{a} < {b}",
    "ls": "{a} <= {b}",
    "hi": "{a} > {b}",
    "hs": "{a} >= {b}",
    # true where an operand is NaN
    "neu": "{a} != {b}",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "num": "({a} == {a}) & ({b} == {b})",
    "nan": "({a} != {a}) | ({b} != {b})",
}


class Unknown(NotImplementedError):
    """An instruction or a form of one that the machine does not know."""


def set_register(w: Writer, instruction: Instruction, operand: Operand, ptx_type: str, expression: str) -> None:
    """Write a result, where the guard holds."""
    guard = w.guard(instruction)
    if guard is not None:
        assert isinstance(operand, Register)
        kind, size = kind_of(ptx_type)
        own = w.kernel.widths[operand.slot]
        if kind != "p" and size != own:
            raise Unknown(f"guarded, of mixed widths: {instruction.text}")
        expression = f"np.where({guard}, {expression}, {w.register(operand.slot, kind, size)})"
    w.write(operand, ptx_type, expression)


def _operands(w: Writer, i: Instruction, ptx_type: str) -> list[str]:
    return [w.read(operand, ptx_type) for operand in i.operands[1:]]


def _flushed(i: Instruction, expression: str) -> str:
    if i.op[-1] != "f32":
        return expression
    if "sat" in i.op:
        expression = f"saturate({expression})"
    return f"flush({expression})" if "ftz" in i.op else expression


def _pair(template: str) -> Callable[[Writer, Instruction], None]:
    """The same on the two floats of a register each, which are neighbours in memory."""

    def emit(w: Writer, i: Instruction) -> None:
        given = [f"np.ascontiguousarray({text}).view(F4)" for text in _operands(w, i, "f32x2")]
        result = template.format(*given)
        result = f"flush({result})" if "ftz" in i.op else result
        set_register(w, i, i.operands[0], "f32x2", f"({result}).view(U8)")

    return emit


def _simple(template: str) -> Callable[[Writer, Instruction], None]:
    """An expression of operands that all have the type of the instruction."""

    def emit(w: Writer, i: Instruction) -> None:
        given = _operands(w, i, i.op[-1])
        if "ftz" in i.op and i.op[-1] == "f32":
            given = [f"flush({text})" for text in given]
        set_register(w, i, i.operands[0], i.op[-1], _flushed(i, template.format(*given)))

    return emit


def _add(sign: str) -> Callable[[Writer, Instruction], None]:
    plain, pair = _simple(f"{{0}} {sign} {{1}}"), _pair(f"{{0}} {sign} {{1}}")

    def emit(w: Writer, i: Instruction) -> None:
        if i.op[-1] == "f32x2":
            return pair(w, i)
        if "cc" in i.op or any(name in i.op for name in ("rm", "rp", "rz")) or i.op[-1].endswith("x2"):
            raise Unknown(i.text)
        return plain(w, i)

    return emit


def _mul(w: Writer, i: Instruction) -> None:
    ptx_type = i.op[-1]
    a, b, *more = i.operands[1:]
    if ptx_type.startswith("f"):
        if any(name in i.op for name in ("rm", "rp", "rz")) or ptx_type == "f16x2":
            raise Unknown(i.text)
        (_pair if ptx_type == "f32x2" else _simple)("{0} * {1}")(w, i)
        return
    first, second = w.read(a, ptx_type), w.read(b, ptx_type)
    result_type = ptx_type
    if "wide" in i.op:
        kind, size = kind_of(ptx_type)
        result_type = f"{ptx_type[0]}{16 * size}"
        wide = VIEWS[kind][2 * size]
        product = f"np.multiply({first}, {second}, dtype={wide})"
    elif "hi" in i.op:
        if ptx_type.endswith("64"):
            raise Unknown(i.text)
        product = f"high_product({first}, {second})"
    else:
        product = f"{first} * {second}"
    if more:
        product = f"{product} + {w.read(more[0], result_type)}"
    set_register(w, i, i.operands[0], result_type, product)


def _fma(w: Writer, i: Instruction) -> None:
    if i.op[-1] == "f32x2" and "rn" in i.op:
        return _pair("fma({0}, {1}, {2})")(w, i)
    if i.op[-1] != "f32":
        raise Unknown(i.text)
    rounding = {"rm": "fma_down", "rp": "fma_up"}
    function = next((rounding[name] for name in i.op if name in rounding), "fma")
    return _simple(f"{function}({{0}}, {{1}}, {{2}})")(w, i)


def _extreme(integer: str, number: str) -> Callable[[Writer, Instruction], None]:
    """NaN gives way to a number."""

    def emit(w: Writer, i: Instruction) -> None:
        function = integer if i.op[-1][0] != "f" else integer if "NaN" in i.op else number
        result = f"np.{function}({{0}}, {{1}})"
        if len(i.operands) == 4:
            result = f"np.{function}({result}, {{2}})"
        _simple(result)(w, i)

    return emit


def _shift(sign: str) -> Callable[[Writer, Instruction], None]:
    def emit(w: Writer, i: Instruction) -> None:
        kind, size = kind_of(i.op[-1])
        by = i.operands[2]
        if isinstance(by, Immediate):
            count = w.constant(VIEWS[kind][size], min(by.value, 8 * size))
        else:
            count = f"np.minimum({w.read(by, 'u32')}, U4({8 * size})).astype({VIEWS[kind][size]})"
        set_register(w, i, i.operands[0], i.op[-1], f"{w.read(i.operands[1], i.op[-1])} {sign} {count}")

    return emit


def _logic(sign: str) -> Callable[[Writer, Instruction], None]:
    return _simple(f"{{0}} {sign} {{1}}")


def _setp(w: Writer, i: Instruction) -> None:
    names = [name for name in i.op[1:-1] if name != "ftz"]
    if names[0] == "ne":
        # an unordered pair is not "not equal" in PTX
        template = "({a} < {b}) | ({a} > {b})" if i.op[-1].startswith("f") else "{a} != {b}"
    else:
        template = COMPARE[names[0]]
    a, b = (w.read(operand, i.op[-1]) for operand in i.operands[1:3])
    if "ftz" in i.op:
        a, b = f"flush({a})", f"flush({b})"
    result = template.format(a=a, b=b)
    if len(names) > 1:
        sign = {"and": "&", "or": "|", "xor": "^"}[names[1]]
        other = w.read(i.operands[3], "pred")
        result = f"({result}) {sign} {other}"
    if isinstance(i.operands[0], Vector) or len(i.operands) > 3 + (len(names) > 1):
        raise Unknown(i.text)
    set_register(w, i, i.operands[0], "pred", result)


def _selp(w: Writer, i: Instruction) -> None:
    a, b = (w.read(operand, i.op[-1]) for operand in i.operands[1:3])
    set_register(w, i, i.operands[0], i.op[-1], f"np.where({w.read(i.operands[3], 'pred')}, {a}, {b})")


def _mov(w: Writer, i: Instruction) -> None:
    to, source = i.operands
    ptx_type = i.op[-1]
    size = kind_of(ptx_type)[1]
    if isinstance(to, Vector):
        # unpacked, the low bits first
        part = size // len(to.parts)
        value = w.temporary()
        w.line(f"{value} = {w.read(source, f'b{8 * size}')}")
        for number, operand in enumerate(to.parts):
            low = f"({value} >> {w.constant(VIEWS['u'][size], 8 * part * number)}).astype({VIEWS['u'][part]})"
            if operand != Symbol("_"):
                set_register(w, i, operand, f"b{8 * part}", low)
        return
    if isinstance(source, Vector):
        part = size // len(source.parts)
        wide = VIEWS["u"][size]
        terms = [
            f"({w.read(operand, f'b{8 * part}')}.astype({wide}) << {w.constant(wide, 8 * part * number)})"
            for number, operand in enumerate(source.parts)
        ]
        set_register(w, i, to, f"b{8 * size}", " | ".join(terms))
        return
    value = w.read(source, ptx_type)
    if isinstance(source, Immediate):
        value = f"full(n, {value})"
    elif isinstance(source, Register):
        # the register file must not share memory between two of its registers
        value = f"{value}.copy()"
    set_register(w, i, to, ptx_type, value)


def _cvt(w: Writer, i: Instruction) -> None:
    to, source = i.op[-2], i.op[-1]
    given = [w.read(operand, source) for operand in i.operands[1:]]
    value = given[0]
    if source == "bf16":
        value, source = f"from_bf16({value})", "f32"
    elif source == "f16":
        value, source = f"{value}.astype(F4)", "f32"
    if source == "f32" and "ftz" in i.op:
        value = f"flush({value})"
    if to in ("bf16x2", "f16x2"):
        function = "to_bf16" if to == "bf16x2" else "to_f16"
        high, low = (f"{function}({text}).astype(U4)" for text in given)
        set_register(w, i, i.operands[0], "b32", f"({high} << U4(16)) | {low}")
        return
    rounding = next((name for name in i.op if name in ("rni", "rzi", "rmi", "rpi")), None)
    if rounding:
        function = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[rounding]
        value = f"np.{function}({value})"
    if any(name in i.op for name in ("rz", "rm", "rp", "relu", "satfinite")):
        raise Unknown(i.text)
    kind, size = kind_of(to)
    if to == "bf16":
        result = f"to_bf16({value})"
    elif to == "f16":
        result, to = f"to_f16({value})", "b16"
    elif kind == "f":
        result = f"{value}.astype({VIEWS['f'][size]})"
        result = f"saturate({result})" if "sat" in i.op else result
    elif source.startswith("f"):
        result = f"to_integer({value}, {VIEWS[kind][size]})"
    else:
        # sizes of integers: the sign is that of the source
        result = f"{value}.astype({VIEWS[kind][max(size, 2)]})"
    set_register(w, i, i.operands[0], to, result)


def _approximate(function: str) -> Callable[[Writer, Instruction], None]:
    def emit(w: Writer, i: Instruction) -> None:
        if i.op[-1] != "f32":
            raise Unknown(i.text)
        value = w.read(i.operands[1], "f32")
        if any(name in i.op for name in ("approx", "approximate")):
            suffix = "_ftz" if "ftz" in i.op and function in ("ex2", "rcp") else ""
            result = f"approximate_{function}{suffix}({value}, M.salt)"
            if "ftz" in i.op and not suffix:
                result = f"flush(approximate_{function}(flush({value}), M.salt))"
        elif "rn" in i.op and function == "rcp":
            result = _flushed(i, f"F4(1) / {value}")
        elif "rn" in i.op and function == "sqrt":
            result = _flushed(i, f"np.sqrt({value})")
        else:
            raise Unknown(i.text)
        set_register(w, i, i.operands[0], "f32", result)

    return emit


def _div(w: Writer, i: Instruction) -> None:
    a, b = _operands(w, i, i.op[-1])
    if i.op[-1].startswith("u"):
        result = f"{a} // {b}"
    elif i.op[-1].startswith("s"):
        result = f"divide({a}, {b})"
    elif "full" in i.op or "approx" in i.op:
        result = f"approximate_div({a}, {b}, M.salt)"
    elif "rn" in i.op:
        result = f"{a} / {b}"
    else:
        raise Unknown(i.text)
    set_register(w, i, i.operands[0], i.op[-1], _flushed(i, result))


def _bfe(w: Writer, i: Instruction) -> None:
    a = w.read(i.operands[1], i.op[-1])
    begin, count = (w.read(operand, "u32") for operand in i.operands[2:])
    function = "bits_extract_signed" if i.op[-1].startswith("s") else "bits_extract"
    set_register(w, i, i.operands[0], i.op[-1], f"{function}({a}, {begin}, {count})")


def _bfi(w: Writer, i: Instruction) -> None:
    a, into = (w.read(operand, i.op[-1]) for operand in i.operands[1:3])
    begin, count = (w.read(operand, "u32") for operand in i.operands[3:])
    set_register(w, i, i.operands[0], i.op[-1], f"bits_insert({a}, {into}, {begin}, {count})")


def _lop3(w: Writer, i: Instruction) -> None:
    a, b, c = (w.read(operand, "b32") for operand in i.operands[1:4])
    table = i.operands[4]
    assert isinstance(table, Immediate)
    set_register(w, i, i.operands[0], "b32", f"logic({a}, {b}, {c}, {table.value})")


def _funnel(w: Writer, i: Instruction) -> None:
    if i.op[2] != "wrap":
        raise Unknown(i.text)
    _simple(f"funnel_{'left' if i.op[1] == 'l' else 'right'}({{0}}, {{1}}, {{2}})")(w, i)


def _prmt(w: Writer, i: Instruction) -> None:
    if len(i.op) > 2:
        raise Unknown(i.text)
    _simple("permute({0}, {1}, {2})")(w, i)


def _not(w: Writer, i: Instruction) -> None:
    _simple("~{0}")(w, i)


def _cvta(w: Writer, i: Instruction) -> None:
    if "shared" in i.op:
        raise Unknown(i.text)
    value = w.read(i.operands[1], i.op[-1])
    set_register(w, i, i.operands[0], i.op[-1], f"{value}.copy()")


def _nothing(w: Writer, i: Instruction) -> None:
    """Has no effect on results."""


COMPUTING: dict[str, Callable[[Writer, Instruction], None]] = {
    "add": _add("+"),
    "sub": _add("-"),
    "mul": _mul,
    "mad": _mul,
    "fma": _fma,
    "div": _div,
    "min": _extreme("minimum", "fmin"),
    "max": _extreme("maximum", "fmax"),
    "rem": _simple("np.fmod({0}, {1})"),
    "neg": _simple("-{0}"),
    "abs": _simple("np.abs({0})"),
    "copysign": _simple("np.copysign({1}, {0})"),
    "and": _logic("&"),
    "or": _logic("|"),
    "xor": _logic("^"),
    "not": _not,
    "lop3": _lop3,
    "shl": _shift("<<"),
    "shr": _shift(">>"),
    "shf": _funnel,
    "prmt": _prmt,
    "bfe": _bfe,
    "bfi": _bfi,
    "setp": _setp,
    "selp": _selp,
    "mov": _mov,
    "cvt": _cvt,
    "cvta": _cvta,
    **{name: _approximate(name) for name in ("ex2", "rcp", "lg2", "rsqrt", "sqrt", "tanh")},
    "popc": lambda w, i: set_register(w, i, i.operands[0], "u32", f"count_bits({w.read(i.operands[1], i.op[-1])})"),
    **dict.fromkeys(("prefetch", "nanosleep", "nop"), _nothing),
}
