"""PTX text to instructions: registers resolved to slots through the scopes that braces open, labels to positions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

__all__ = ["Immediate", "Instruction", "Kernel", "Label", "Memory", "Module", "Operand", "Register", "Symbol", "Vector"]

# what `.reg` declares; types beside .pred are names of a width
WIDTHS = {"pred": 0, **{f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}, "f16x2": 4}


class Register(NamedTuple):
    """A slot of the register file."""

    slot: int


class Immediate(NamedTuple):
    """An integer, or the bits of a float where ``bits`` is 32 or 64."""

    value: int
    bits: int = 0


class Symbol(NamedTuple):
    """A special register (%tid.x), a parameter or a variable in shared memory."""

    name: str


class Label(NamedTuple):
    """The position of an instruction."""

    position: int


class Memory(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    parts: tuple[Operand, ...]


Operand = Register | Immediate | Symbol | Label | Memory | Vector


@dataclass
class Instruction:
    """``@guard op operands``: ``op`` is the opcode with its modifiers, split at the dots."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str

    @property
    def name(self) -> str:
        return ".".join(self.op)


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """One entry of a module.

    Attributes:
        widths: bytes of each register, 0 for a predicate.
        labels: positions that branches lead to.
        shared: offset of each variable in shared memory; the dynamic one begins after those of known size.
        static: bytes of the variables of known size.
    """

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    labels: set[int] = field(default_factory=set)
    shared: dict[str, int] = field(default_factory=dict)
    static: int = 0

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


class Module:
    """The text of a PTX file; kernels are parsed when they are asked for."""

    def __init__(self, text: str) -> None:
        # debug sections are data in another syntax
        text = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0]
        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        self._kernels: dict[str, Kernel] = {}

    @cached_property
    def names(self) -> list[str]:
        return re.findall(r"\.entry\s+([\w$]+)", self.text)

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = self._parse(name)
        return self._kernels[name]

    def fresh_kernel(self, name: str) -> Kernel:
        """One that may be changed."""
        return self._parse(name)

    def _parse(self, name: str) -> Kernel:
        found = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", self.text)
        assert found, f"no kernel {name}"
        head_end = self.text.index(")", found.end())
        parameters, offset = [], 0
        for declared in self.text[found.end() : head_end].split(","):
            if declared.strip():
                size, align, parameter = _parameter(declared)
                offset += -offset % align
                parameters.append(Parameter(parameter, offset, size))
                offset += size
        begin = self.text.index("{", head_end)
        kernel = Kernel(name, parameters)
        for declared in re.findall(r"\.shared\s[^;]*;", self.text[: self.text.index(".entry")]):
            _declare_shared(kernel, declared.rstrip(";"))
        _Body(kernel, self.text, begin).parse()
        return kernel


def _parameter(text: str) -> tuple[int, int, str]:
    """Bytes, alignment and name."""
    words = text.replace("[", " [").split()
    width = next(WIDTHS[word[1:]] for word in words if word[1:] in WIDTHS)
    array = re.search(r"(\S+)\s*\[(\d+)\]", " ".join(words))
    if array is None:
        return width, width, words[-1]
    align = re.search(r"\.align (\d+)", " ".join(words))
    return width * int(array[2]), int(align[1]) if align else width, array[1]


def _declare_shared(kernel: Kernel, text: str) -> None:
    found = re.search(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?", text[text.index(".shared") + 7 :])
    assert found, text
    kernel.static += -kernel.static % int(found[1] or WIDTHS[found[2]])
    kernel.shared[found[3]] = kernel.static
    kernel.static += WIDTHS[found[2]] * (1 if found[4] is None else int(found[4] or 0))


@dataclass
class _Scope:
    names: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # prefix: first slot and count
    labels: dict[str, int] = field(default_factory=dict)


class _Body:
    def __init__(self, kernel: Kernel, text: str, begin: int) -> None:
        self.kernel, self.text, self.place = kernel, text, begin
        self.scopes: list[_Scope] = []
        self.branches: list[tuple[Instruction, list[_Scope]]] = []

    def parse(self) -> None:
        label = re.compile(r"([$\w]+)\s*:(?!:)")
        line = re.compile(r"\.(loc|file)\b[^\n]*")
        space = re.compile(r"\s*")
        text = self.text
        while True:
            self.place = space.match(text, self.place).end()  # type: ignore[union-attr]
            if text[self.place] == "{":
                self.scopes.append(_Scope())
                self.place += 1
            elif text[self.place] == "}":
                self.scopes.pop()
                self.place += 1
                if not self.scopes:
                    break
            elif found := line.match(text, self.place):
                # has no semicolon
                self.place = found.end()
            elif found := label.match(text, self.place):
                self.scopes[-1].labels[found[1]] = len(self.kernel.instructions)
                self.place = found.end()
            else:
                end = text.index(";", self.place)
                self._statement(text[self.place : end].strip())
                self.place = end + 1
        for instruction, scopes in self.branches:
            target = instruction.operands[-1]
            assert isinstance(target, Symbol)
            position = next(scope.labels[target.name] for scope in reversed(scopes) if target.name in scope.labels)
            instruction.operands = (*instruction.operands[:-1], Label(position))
            self.kernel.labels.add(position)

    def _statement(self, text: str) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self._registers(text[4:])
        elif text.startswith(".shared"):
            _declare_shared(self.kernel, text)
        else:
            self._instruction(text)

    def _registers(self, text: str) -> None:
        kind, names = text.split(None, 1)
        for name in (part.strip() for part in names.split(",")):
            first = len(self.kernel.widths)
            if found := re.fullmatch(r"([%$\w]+)<(\d+)>", name):
                self.scopes[-1].ranges[found[1]] = first, int(found[2])
                self.kernel.widths += [WIDTHS[kind[1:]]] * int(found[2])
            else:
                self.scopes[-1].names[name] = first
                self.kernel.widths.append(WIDTHS[kind[1:]])

    def _register(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
            prefix = name.rstrip("0123456789")
            if prefix in scope.ranges and prefix != name:
                first, count = scope.ranges[prefix]
                number = int(name[len(prefix) :])
                if number < count:
                    # found again without a search
                    scope.names[name] = first + number
                    return first + number
        return None

    def _instruction(self, text: str) -> None:
        guard, negated = None, False
        rest = text
        if rest.startswith("@"):
            word, rest = rest[1:].split(None, 1)
            negated = word.startswith("!")
            slot = self._register(word.lstrip("!"))
            assert slot is not None, text
            guard = Register(slot)
        name, *given = rest.split(None, 1)
        operands = tuple(self._operand(part) for part in _split(given[0] if given else ""))
        instruction = Instruction(tuple(name.split(".")), operands, guard, negated, " ".join(text.split()))
        if instruction.op[0] == "bra":
            self.branches.append((instruction, list(self.scopes)))
        self.kernel.instructions.append(instruction)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        if re.match(r"-?\d", text):
            return _immediate(text)
        slot = self._register(text)
        return Symbol(text) if slot is None else Register(slot)

    def _address(self, text: str) -> Memory:
        base, _, offset = (part.strip() for part in text.partition("+"))
        found = self._operand(base)
        assert isinstance(found, Register | Symbol | Immediate), text
        return Memory(found, int(offset or "0", 0))


def _split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    last = text[begin:].strip()
    return [*parts, last] if last else parts


def _immediate(text: str) -> Immediate:
    if text[:2] in ("0f", "0F"):
        return Immediate(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D"):
        return Immediate(int(text[2:], 16), 64)
    return Immediate(int(text.rstrip("U"), 0))
