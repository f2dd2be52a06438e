"""A basic block as Python source: numpy statements on all threads that stand at it, without a loop over them.

A register is a local variable of the function; what the block finds is taken from the register file first, and what
later blocks read is put back at the end. One register has a variable for each way to look at its bits, made when it is
first used so: ``r7u`` unsigned, ``r7s`` signed, ``r7f`` float, ``r7h`` half; ``r7p`` is a predicate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import numpy as np

from tests.kernels.ptx.blocks import Block
from tests.kernels.ptx.parse import Immediate, Instruction, Kernel, Memory, Operand, Register, Symbol

__all__ = ["Writer", "translate"]

VIEWS = {
    "u": {2: "U2", 4: "U4", 8: "U8"},
    "s": {2: "I2", 4: "I4", 8: "I8"},
    "f": {4: "F4", 8: "F8"},
    "h": {2: "F2"},
}
DTYPES: dict[str, Any] = {
    "U1": np.uint8,
    "U2": np.uint16,
    "U4": np.uint32,
    "U8": np.uint64,
    "I2": np.int16,
    "I4": np.int32,
    "I8": np.int64,
    "F2": np.float16,
    "F4": np.float32,
    "F8": np.float64,
}


def kind_of(ptx_type: str) -> tuple[str, int]:
    """How a type of an instruction looks at bits, and its bytes: "s32" is ("s", 4)."""
    if ptx_type == "pred":
        return "p", 0
    if ptx_type in ("bf16", "bf16x2", "f16x2", "f32x2"):
        return "u", {"bf16": 2, "f32x2": 8}.get(ptx_type, 4)
    size = int(ptx_type[1:]) // 8
    if ptx_type[0] == "f":
        return ("h", 2) if size == 2 else ("f", size)
    return ("s" if ptx_type[0] == "s" and size > 1 else "u"), size


@dataclass
class Writer:
    """The source of one block, as far as it is written."""

    kernel: Kernel
    lines: list[tuple[str, int]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    position: int = 0
    _views: dict[int, set[str]] = field(default_factory=dict)
    _made: dict[int, None] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)
    _temporaries: int = 0

    def line(self, text: str) -> None:
        self.lines.append((text, self.position))

    def temporary(self) -> str:
        self._temporaries += 1
        return f"t{self._temporaries}"

    def constant(self, dtype: str, value: int, bits: int = 0) -> str:
        """A name for a number; ``bits`` says that it holds those of a float."""
        key = dtype, value, bits
        if key not in self._names:
            kind = DTYPES[dtype]
            size = np.dtype(kind).itemsize
            raw = np.array(value % (1 << 8 * (bits // 8 or size)), f"u{bits // 8 or size}").view(f"u{size}").view(kind)
            self._names[key] = f"k{len(self._names)}"
            self.constants[self._names[key]] = raw[()]
        return self._names[key]

    def read(self, operand: Operand, ptx_type: str) -> str:
        """An expression for the value of an operand."""
        kind, size = kind_of(ptx_type)
        if isinstance(operand, Immediate):
            if kind == "p":
                return str(operand.value != 0)
            return self.constant(VIEWS[kind][max(size, 2)], operand.value, operand.bits)
        if isinstance(operand, Symbol):
            return self.symbol(operand.name, size)
        assert isinstance(operand, Register), operand
        return self.register(operand.slot, kind, size)

    def register(self, slot: int, kind: str, size: int) -> str:
        own = self.kernel.widths[slot]
        views = self._views.setdefault(slot, set())
        if kind == "p":
            if "p" not in views:
                self.found.append(f"r{slot}p = S[{slot}][I]")
                views.add("p")
            return f"r{slot}p"
        if not views:
            self.found.append(f"r{slot}u = S[{slot}][I]")
            views.add("u")
        wide = size < own
        wanted = "u" if wide else kind
        if wanted not in views:
            source = sorted(views)[0]
            self.line(f"r{slot}{wanted} = r{slot}{source}.view({VIEWS[wanted][own]})")
            views.add(wanted)
        name = f"r{slot}{wanted}"
        if not wide:
            return name
        # the low bits of a wider register
        low = f"{name}.astype({VIEWS['u'][max(size, 2)]})"
        return low if kind == "u" else f"{low}.view({VIEWS[kind][size]})"

    def write(self, operand: Operand, ptx_type: str, expression: str) -> None:
        """``operand = expression``, whose dtype is that of the type."""
        if operand == Symbol("_"):
            self.line(expression)
            return
        assert isinstance(operand, Register), operand
        slot, own = operand.slot, self.kernel.widths[operand.slot]
        kind, size = kind_of(ptx_type)
        if kind != "p" and size < own:
            # a wider register is filled up with zeros, or with the sign
            expression = f"({expression}).astype({VIEWS['s' if kind == 's' else 'u'][own]})"
            kind = "s" if kind == "s" else "u"
        self.line(f"r{slot}{kind} = {expression}")
        self._views[slot] = {kind}
        self._made[slot] = None

    def symbol(self, name: str, size: int) -> str:
        if name.startswith("%"):
            return f"M.special({name!r}, I)"
        place = self.address_of(name)
        return f"full(n, {self.constant(VIEWS['u'][size], place)})"

    def address_of(self, name: str) -> int:
        """Of a parameter its offset among them, of a variable in shared memory its address."""
        for parameter in self.kernel.parameters:
            if parameter.name == name:
                return parameter.offset
        from tests.kernels.ptx.shared import BASE

        return BASE + self.kernel.shared[name]

    def address(self, operand: Operand) -> str:
        """Of a memory operand, in bytes."""
        assert isinstance(operand, Memory), operand
        base = operand.base
        if isinstance(base, Symbol):
            return f"full(n, {self.constant('U4', self.address_of(base.name) + operand.offset)})"
        if isinstance(base, Immediate):
            return f"full(n, {self.constant('U8', base.value + operand.offset)})"
        own = self.kernel.widths[base.slot]
        name = self.register(base.slot, "u", own)
        return f"{name} + {self.constant(VIEWS['u'][own], operand.offset)}" if operand.offset else name

    def guard(self, instruction: Instruction) -> str | None:
        """The predicate of an instruction, as a vector of bools."""
        if instruction.guard is None:
            return None
        name = self.register(instruction.guard.slot, "p", 0)
        return f"~{name}" if instruction.negated else name

    def source(self, name: str, live: frozenset[int], result: str) -> tuple[str, list[int]]:
        """The function, and the position of the instruction behind each of its lines."""
        head = [f"def {name}(M, S, I, n):", *(f"    {text}" for text in self.found)]
        body = [(f"    {text}", position) for text, position in self.lines]
        kept = []
        for slot in self._made:
            if slot in live:
                views = self._views[slot]
                first = sorted(views)[0]
                own = self.kernel.widths[slot]
                expression = f"r{slot}{first}" if first in "pu" else f"r{slot}{first}.view({VIEWS['u'][own]})"
                kept.append(f"    S[{slot}][I] = {expression}")
        last = self.position
        text = [*head, *(line for line, _ in body), *kept, f"    return {result}"]
        return "\n".join(text), [self.position] * len(head) + [p for _, p in body] + [last] * (len(kept) + 1)


def translate(kernel: Kernel, block: Block, number: int, emit: Callable[[Writer, Instruction], str | None]) -> Any:
    """Compile a block.

    Returns:
        the function of (machine, registers, lanes, their count), and the positions of instructions by line.
    """
    from tests.kernels.ptx import approximate, numerics

    writer = Writer(kernel)
    result = "None"
    for offset, instruction in enumerate(block.instructions):
        writer.position = block.first + offset
        result = emit(writer, instruction) or "None"
    name = f"block_{number}"
    text, positions = writer.source(name, block.live, result)
    space: dict[str, Any] = {**numerics.FUNCTIONS, **approximate.FUNCTIONS, **writer.constants}
    code: CodeType = compile(text, f"<{kernel.name} {name}>", "exec")
    exec(code, space)
    return space[name], positions
