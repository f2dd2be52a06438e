"""Basic blocks of a kernel, which registers live between them, and what each of them counts for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.kernels.ptx.parse import Instruction, Kernel, Label, Memory, Operand, Register, Vector

__all__ = ["Block", "blocks_of", "reads_and_writes"]

# operands that are not written first
STORING = {"st", "bar", "barrier", "bra", "ret", "exit", "fence", "membar", "cp", "trap", "prefetch", "stmatrix"}
# other units than that of ordinary arithmetic execute these
SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"}


@dataclass
class Block:
    """Instructions without a branch into or out of them but at the ends.

    An instruction at which threads meet others is a block of its own, so that whatever stands before and after it may
    run at another time.

    Attributes:
        first: position of the first instruction.
        follower: index of the block after this one.
        target: index of the block that its branch leads to.
        live: registers that the blocks after it may read.
    """

    first: int
    instructions: list[Instruction]
    follower: int
    target: int | None = None
    live: frozenset[int] = frozenset()
    issued: int = field(init=False)
    special: int = field(init=False)

    def __post_init__(self) -> None:
        # the assembler folds moves of registers and constants into what reads them
        self.issued = sum(instruction.op[0] != "mov" for instruction in self.instructions)
        self.special = sum(instruction.op[0] in SPECIAL for instruction in self.instructions)


def meets(instruction: Instruction) -> bool:
    """Whether threads wait for others here, or let others go on."""
    op = instruction.op
    if op[0] == "mbarrier":
        return op[1] != "init"
    return op[0] in {"bar", "barrier"} or op[:3] == ("cp", "async", "bulk") or "wait_group" in op or "wait_all" in op


def blocks_of(kernel: Kernel) -> list[Block]:
    given = kernel.instructions
    cuts = {0, len(given), *kernel.labels}
    for position, instruction in enumerate(given):
        if instruction.op[0] in {"bra", "ret", "exit", "trap"}:
            cuts.add(position + 1)
        if meets(instruction):
            cuts |= {position, position + 1}
    edges = sorted(cuts)
    index = {first: number for number, first in enumerate(edges[:-1])}
    blocks = []
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        block = Block(first, given[first:last], number + 1)
        branch = block.instructions[-1]
        if branch.op[0] == "bra":
            label = branch.operands[-1]
            assert isinstance(label, Label)
            block.target = index.get(label.position, len(edges) - 1)
        blocks.append(block)
    _find_live(blocks)
    return blocks


def _registers(operand: Operand) -> Iterator[int]:
    if isinstance(operand, Register):
        yield operand.slot
    elif isinstance(operand, Vector):
        for part in operand.parts:
            yield from _registers(part)
    elif isinstance(operand, Memory):
        yield from _registers(operand.base)


def reads_and_writes(instruction: Instruction) -> tuple[list[int], list[int]]:
    """Slots of registers."""
    name, operands = instruction.op[0], instruction.operands
    writes: list[int] = []
    if name == "wgmma" and "mma_async" in instruction.op:
        # adds to what it finds
        writes = list(_registers(operands[0]))
        reads = [slot for operand in operands for slot in _registers(operand)]
    elif name in STORING or name == "wgmma" or not operands:
        reads = [slot for operand in operands for slot in _registers(operand)]
    else:
        first = operands[0]
        writes = [] if isinstance(first, Memory) else list(_registers(first))
        rest = operands if isinstance(first, Memory) else operands[1:]
        reads = [slot for operand in rest for slot in _registers(operand)]
    if instruction.guard is not None:
        # what is not overwritten stays
        reads = [*reads, instruction.guard.slot, *writes]
    return reads, writes


def _find_live(blocks: list[Block]) -> None:
    """Backwards until nothing changes; sets of registers are the bits of integers."""
    used, made = [], []
    for block in blocks:
        reads = writes = 0
        for instruction in block.instructions:
            r, w = reads_and_writes(instruction)
            for slot in r:
                reads |= (1 << slot) & ~writes
            for slot in w:
                writes |= 1 << slot
        used.append(reads)
        made.append(writes)
    before = [0] * (len(blocks) + 1)
    after = [0] * len(blocks)
    changed = True
    while changed:
        changed = False
        for number in range(len(blocks) - 1, -1, -1):
            block = blocks[number]
            last = block.instructions[-1]
            out = 0
            if not (last.op[0] in {"ret", "exit", "trap"} or (last.op[0] == "bra" and last.guard is None)):
                out |= before[block.follower]
            if block.target is not None:
                out |= before[block.target]
            found = used[number] | (out & ~made[number])
            after[number] = out
            if found != before[number]:
                before[number] = found
                changed = True
    for block, out in zip(blocks, after, strict=True):
        block.live = frozenset(_bits(out))


def _bits(value: int) -> Iterator[int]:
    while value:
        low = value & -value
        yield low.bit_length() - 1
        value ^= low
