"""A launch of a kernel: blocks of threads in numpy vectors, run a basic block at a time in an order drawn from a seed.

All threads of a few clusters have a place (a lane) in every vector. A step runs one basic block on those lanes of a
chosen set of warps that stand at its beginning, the lowest position first: so lanes of a warp that diverged meet again
by themselves. Which warps are chosen, and for how many steps, is up to `Scheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.asynchronous import Engine
from tests.kernels.ptx.blocks import Block, blocks_of
from tests.kernels.ptx.calls import Calls
from tests.kernels.ptx.meeting import Meeting
from tests.kernels.ptx.memory import Fault, Global
from tests.kernels.ptx.parse import Kernel, Register
from tests.kernels.ptx.products import Products
from tests.kernels.ptx.scheduler import Scheduler
from tests.kernels.ptx.shared import Shared
from tests.kernels.ptx.threads import DONE, READY, Threads
from tests.kernels.ptx.traffic import emit
from tests.kernels.ptx.translate import translate

__all__ = ["Counters", "Geometry", "Program", "run"]

Array = npt.NDArray[Any]
WARP = 32
# threads that run together
LANES = 4096
# of a launch that comes to an end
MOST_STEPS = 20_000_000


@dataclass
class Counters:
    """What a launch did. A warp issues an instruction once for all of its 32 lanes, whichever of them need it."""

    instructions: int = 0  # lane-instructions
    special: int = 0  # of them, those of the unit for special functions
    read: int = 0  # bytes of global memory
    written: int = 0


@dataclass(frozen=True)
class Geometry:
    """Blocks (x, y, z), threads of a block, blocks of a cluster, bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    threads: int
    cluster: int = 1
    shared: int = 0


class Program:
    """A kernel whose blocks are translated when they are first run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.blocks: list[Block] = blocks_of(kernel)
        self.functions: list[Any] = [None] * len(self.blocks)
        self.positions: list[list[int]] = [[]] * len(self.blocks)
        self.live = sorted({slot for block in self.blocks for slot in block.live})
        ops = {i.op[:3] for i in kernel.instructions}
        moves = [i for i in kernel.instructions if i.op[0] in ("ld", "st", "ldmatrix", "stmatrix") and "shared" in i.op]
        sizes = [int(i.op[-1].lstrip("bfsu")) // 8 for i in moves]
        self.grain = min([4, *sizes])
        self.proxied = ("cp", "async", "bulk") in ops or any(op[0] == "wgmma" for op in ops)

    def function(self, number: int) -> Any:
        if self.functions[number] is None:
            self.functions[number], self.positions[number] = translate(self.kernel, self.blocks[number], number, emit)
        return self.functions[number]


def run(
    program: Program,
    geometry: Geometry,
    parameters: bytes,
    memory: Global,
    seed: int = 1,
    blocks: range | None = None,
    salt: int | None = None,
) -> Counters:
    """Launch a kernel.

    Args:
        parameters: as they lie in its parameter space.
        memory: what it may touch.
        seed: of the order of threads and of garbage.
        blocks: which of the grid's blocks run, whole clusters; None stands for all.
        salt: of the errors of approximate instructions; None takes the seed.

    Raises:
        Fault: something that a GPU would not forgive, or that would hang.
    """
    counters = Counters()
    generator = np.random.default_rng(seed)
    total = geometry.grid[0] * geometry.grid[1] * geometry.grid[2]
    chosen = range(total) if blocks is None else blocks
    each = max(1, LANES // (geometry.threads * geometry.cluster)) * geometry.cluster
    with np.errstate(all="ignore"):
        for first in range(chosen.start, chosen.stop, each):
            part = range(first, min(first + each, chosen.stop))
            Machine(
                program, geometry, parameters, memory, seed, generator, part, counters, seed if salt is None else salt
            ).run()
    counters.read, counters.written = memory.read, memory.written
    return counters


@dataclass
class Machine(Calls):
    """Blocks that run together."""

    program: Program
    geometry: Geometry
    parameter_bytes: bytes
    memory: Global
    seed: int
    generator: np.random.Generator
    running: range
    counters: Counters
    salt: int

    def __post_init__(self) -> None:
        g, kernel = self.geometry, self.program.kernel
        self.threads = Threads(g.grid, g.threads, g.cluster, self.running)
        count = self.threads.count
        size = kernel.static + g.shared
        blocks = len(self.running)
        self.shared = Shared(blocks, size, g.cluster > 1, self.program.proxied, self.program.grain, self.generator)
        self.scheduler = Scheduler(self.threads, self.seed, self.generator)
        self.engine = Engine(self.memory, self.shared, count, self.generator, self.scheduler.haste)
        self.meeting = Meeting(self.threads, self.shared, self.engine)
        self.registers: list[Any] = [None] * len(kernel.widths)
        for slot in self.program.live:
            width = kernel.widths[slot]
            if width:
                self.registers[slot] = self.generator.integers(0, 256, count * width, np.uint8).view(f"u{width}")
            else:
                self.registers[slot] = self.generator.integers(0, 2, count, np.uint8).view(bool)
        self.products = Products(self.threads, self.shared, self.registers)

    def run(self) -> None:
        threads, done = self.threads, 0
        while (threads.status != DONE).any():
            if self.engine.queue or self.engine.copies:
                self.engine.land(self.scheduler.landing())
                self.meeting.wake_at_mbarriers()
            if not (threads.status == READY).any():
                if not self.engine.queue:
                    raise Fault(f"{self.program.kernel.name}: all threads wait, {self.meeting.describe()}")
                self.engine.land(1.0)
                self.meeting.wake_at_mbarriers()
                continue
            group, steps = self.scheduler.choose()
            for _ in range(steps):
                standing = np.where(group & (threads.status == READY), threads.position, len(self.program.blocks))
                position = int(standing.min())
                if position == len(self.program.blocks):
                    break
                self.step(position, np.flatnonzero(standing == position))
                done += 1
                if done > MOST_STEPS:
                    raise Fault(f"{self.program.kernel.name}: no end in sight")

    def step(self, number: int, lanes: Array) -> None:
        """One basic block on some lanes."""
        block = self.program.blocks[number]
        function = self.program.function(number)
        first, last = int(lanes[0]), int(lanes[-1])
        I = slice(first, last + 1) if last - first + 1 == len(lanes) else lanes  # noqa: E741
        warps = int(np.count_nonzero(np.diff(self.threads.warp[lanes]))) + 1
        self.counters.instructions += WARP * warps * block.issued
        self.counters.special += WARP * warps * block.special
        try:
            result = function(self, self.registers, I, len(lanes))
            self._go_on(number, block, I, lanes, result)
        except Fault as fault:
            raise Fault(f"{fault}; {self._where(number, lanes, fault)}") from fault

    def _where(self, number: int, lanes: Array, fault: Fault) -> str:
        block = self.program.blocks[number]
        instruction = block.instructions[-1]
        trace = fault.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name == f"block_{number}":
                position = self.program.positions[number][trace.tb_lineno - 1]
                instruction = block.instructions[position - block.first]
            trace = trace.tb_next
        lane = int(lanes[0])
        where = f"block {self.running[lane // self.geometry.threads]}, thread {lane % self.geometry.threads} or another"
        return f"at `{instruction.text}` in {self.program.kernel.name}, {where}"

    def _go_on(self, number: int, block: Block, I: Any, lanes: Array, result: Any) -> None:  # noqa: E741
        threads = self.threads
        last = block.instructions[-1]
        name = last.op[0]
        if name == "bra":
            assert block.target is not None
            threads.position[I] = block.target if result is None else np.where(result, block.target, block.follower)
        elif name in ("ret", "exit"):
            threads.whole(lanes, "an exit")
            self.meeting.end(lanes)
        elif name == "mbarrier" and last.op[1] in ("try_wait", "test_wait"):
            self._wait_at_mbarrier(block, lanes, result)
        else:
            threads.position[I] = block.follower
            if name in ("bar", "barrier"):
                self._meet(last.op, lanes, result)

    def _meet(self, op: tuple[str, ...], lanes: Array, result: Any) -> None:
        if op[1] == "cluster":
            if op[2] == "arrive":
                self.meeting.cluster_arrive(lanes, relaxed="relaxed" in op)
            else:
                self.meeting.cluster_wait(lanes)
        elif op[1] == "sync":
            self.threads.whole(lanes, "a block barrier")
            self.meeting.block_barrier(lanes, *result)

    def _wait_at_mbarrier(self, block: Block, lanes: Array, result: Any) -> None:
        """Those whose phase has passed go on; of the others some give up, as they may, and try again."""
        instruction = block.instructions[-1]
        target = instruction.operands[0]
        assert isinstance(target, Register)
        addresses, parities = (np.broadcast_to(part, len(lanes)) for part in result)
        passed = self.meeting.passed(lanes, addresses, parities)
        tired = self.generator.random() < 0.25 or instruction.op[1] == "test_wait"
        going = np.ones(len(lanes), bool) if tired else passed
        if self.registers[target.slot] is not None:
            self.registers[target.slot][lanes[going]] = passed[going]
        self.threads.position[lanes[going]] = block.follower
        self.meeting.wait_at_mbarrier(lanes[~going], addresses[~going], parities[~going])
