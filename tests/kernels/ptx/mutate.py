"""Kernels with an instruction less, or a weaker one: what the tests must see if they can see anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from tests.kernels.ptx.parse import Immediate, Instruction, Kernel

__all__ = ["Mutation", "mutations"]


class Mutation(NamedTuple):
    """A change to the instruction at a position."""

    position: int
    what: str

    def __call__(self, kernel: Kernel) -> None:
        instruction = kernel.instructions[self.position]
        kernel.instructions[self.position] = CHANGES[self.what.split()[0]](instruction)


def _removed(instruction: Instruction) -> Instruction:
    if instruction.op[:2] == ("mbarrier", "try_wait"):
        # as if the phase had passed
        return Instruction(("mov", "pred"), (instruction.operands[0], Immediate(-1)), None, False, "(removed wait)")
    return Instruction(("nop",), (), None, False, f"(removed {instruction.text})")


def _relaxed(instruction: Instruction) -> Instruction:
    return replace(instruction, op=tuple("relaxed" if name == "release" else name for name in instruction.op))


def _without_bytes(instruction: Instruction) -> Instruction:
    """An arrival that expects nothing."""
    return replace(instruction, operands=(*instruction.operands[:-1], Immediate(0)))


CHANGES: dict[str, Callable[[Instruction], Instruction]] = {
    "remove": _removed,
    "relax": _relaxed,
    "expect-nothing": _without_bytes,
}


def mutations(kernel: Kernel) -> list[Mutation]:
    """Each synchronising instruction removed, each release relaxed, each expectation of bytes emptied."""
    found = []
    for position, instruction in enumerate(kernel.instructions):
        op = instruction.op
        # a copy's group that is not closed joins the next one: where all are waited for that is the same
        waits = {"bulk", "wait_group", "wait_all"} & set(op) or op[:2] == ("wgmma", "commit_group")
        if op[0] in ("bar", "barrier", "mbarrier", "fence") or (op[0] in ("cp", "wgmma") and waits):
            found.append(Mutation(position, f"remove {instruction.name}"))
        if "release" in op:
            found.append(Mutation(position, f"relax {instruction.name}"))
        if "expect_tx" in op:
            found.append(Mutation(position, f"expect-nothing {instruction.name}"))
    return found
