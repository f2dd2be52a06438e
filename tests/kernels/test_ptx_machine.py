"""The PTX machine itself: what instructions compute, and which mistakes it finds, on kernels of a few lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.ptx import approximate
from tests.kernels.ptx.instructions import Unknown
from tests.kernels.ptx.machine import Counters, Geometry, Program, run
from tests.kernels.ptx.memory import Fault, Global, put_back, region_of
from tests.kernels.ptx.parse import Module

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry kernel(.param .u64 kernel_in, .param .u64 kernel_out)
{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<30>;
  .reg .f32 %f<9>;
  .reg .b64 %d<20>;
  .loc 1 7 3
  ld.param.u64 %d1, [kernel_in];
  ld.param.u64 %d2, [kernel_out];
  cvta.to.global.u64 %d1, %d1;
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mad.lo.s32 %r4, %r2, %r3, %r1;      // of the grid
  mul.wide.u32 %d3, %r4, 4;
  add.s64 %d4, %d1, %d3;
  add.s64 %d5, %d2, %d3;
  mov.u32 %r20, memory;
"""


def execute(body: str, given: Tensor, threads: int = 32, shared: int = 4096, cluster: int = 1, seed: int = 0) -> Tensor:
    """Run a kernel with a thread for each of ``given``, whose address in the input is %d4 and in the output %d5."""
    return counted(body, given, threads, shared, cluster, seed)[0]


def counted(
    body: str, given: Tensor, threads: int = 32, shared: int = 4096, cluster: int = 1, seed: int = 0
) -> tuple[Tensor, Counters]:
    out = torch.zeros_like(given)
    regions = [region_of("in", given), region_of("out", out, written=1)]
    program = Program(Module(HEAD + body + "ret;\n}\n").kernel("kernel"))
    geometry = Geometry((len(given) // threads, 1, 1), threads, cluster, shared)
    parameters = np.array([given.data_ptr(), out.data_ptr()], np.uint64).tobytes()
    counters = run(program, geometry, parameters, Global(regions), seed)
    put_back(regions[1], out)
    return out, counters


def numbers(count: int = 32) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def computes(line: str, given: Tensor) -> Tensor:
    """A line from %r10 (or %f1) to %r11 (or %f2)."""
    body = f"ld.global.u32 %r10, [%d4];\nmov.b32 %f1, %r10;\n{line}\n"
    return execute(body + ("st.global.f32 [%d5], %f2;\n" if "%f2" in line else "st.global.u32 [%d5], %r11;\n"), given)


def reversed_parts(x: Tensor, part: torch.dtype) -> Tensor:
    return x.view(part).view(len(x), -1).flip(1).contiguous().view(-1).view(torch.int32)


PI = np.float32(np.pi).item()
SIGNED = torch.randint(-(2**31), 2**31, (64,), generator=torch.Generator().manual_seed(0)).int()
REAL = torch.cat(
    [torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, torch.inf, 1e-40, 2.5])]
)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("add.s32 %r11, %r10, 7;", lambda x: x + 7),
        ("mul.hi.s32 %r11, %r10, 1234567;", lambda x: (x.long() * 1234567 >> 32).int()),
        ("shr.s32 %r11, %r10, 5;", lambda x: x >> 5),
        ("shl.b32 %r11, %r10, 40;", torch.zeros_like),
        ("div.s32 %r11, %r10, -7;", lambda x: torch.div(x, -7, rounding_mode="trunc")),
        ("rem.s32 %r11, %r10, 7;", lambda x: torch.fmod(x, 7)),
        ("bfe.s32 %r11, %r10, 4, 8;", lambda x: x << 20 >> 24),
        ("prmt.b32 %r11, %r10, 0, 0x0123;", lambda x: reversed_parts(x, torch.uint8)),
        ("shf.r.wrap.b32 %r11, %r10, 0, 8;", lambda x: (x.long() % 2**32 >> 8).int()),
        ("lop3.b32 %r11, %r10, 255, 3, 0x6A;", lambda x: (x & 255) ^ 3),
        ("min.u32 %r11, %r10, 1000;", lambda x: (x.long() % 2**32).clamp(max=1000).int()),
        ("cvt.s64.s32 %d9, %r10; shr.s64 %d9, %d9, 32; cvt.u32.u64 %r11, %d9;", lambda x: x >> 31),
        ("setp.lt.s32 %p1, %r10, 0; selp.b32 %r11, 1, 2, %p1;", lambda x: torch.where(x < 0, 1, 2)),
        ("mov.b32 {%h1, %h2}, %r10; mov.b32 %r11, {%h2, %h1};", lambda x: reversed_parts(x, torch.int16)),
        ("popc.b32 %r11, %r10;", lambda x: torch.tensor([int(v % 2**32).bit_count() for v in x.tolist()])),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_integers(line, want):
    assert torch.equal(computes(line, SIGNED), want(SIGNED).int())


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("fma.rn.f32 %f2, %f1, 0f40490FDB, 0f3F800000;", lambda x: (x.double() * PI + 1.0).float()),
        ("add.ftz.f32 %f2, %f1, 0f00000000;", lambda x: torch.where(x.abs() < 1e-38, 0.0, x)),
        ("max.f32 %f2, %f1, 0f7FC00000;", lambda x: x),
        ("cvt.rni.f32.f32 %f2, %f1;", torch.round),
        ("cvt.sat.f32.f32 %f2, %f1;", lambda x: x.clamp(0, 1)),
        ("rcp.rn.f32 %f2, %f1;", lambda x: 1.0 / x),
        ("copysign.f32 %f2, 0fBF800000, %f1;", lambda x: -x.abs()),
        ("cvt.rn.bf16.f32 %h1, %f1; cvt.f32.bf16 %f2, %h1;", lambda x: x.bfloat16().float()),
        ("cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f2, %h1;", lambda x: x.half().float()),
        ("cvt.rzi.s32.f32 %r10, %f1; cvt.rn.f32.s32 %f2, %r10;", lambda x: x.clamp(max=2.0**31).trunc()),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_floats(line, want):
    assert torch.equal(computes(line, REAL.view(torch.int32)).view(torch.float32), want(REAL))


@pytest.mark.parametrize(
    ("function", "exact", "bound"),
    [(approximate.ex2, np.exp2, 2.0**-22), (approximate.rcp, lambda x: 1.0 / x, 2.0**-23)],
    ids=["ex2", "rcp"],
)
def test_approximate_instructions_use_their_bound_and_keep_it(function, exact, bound):
    x = np.random.default_rng(0).uniform(-8, 8, 10000).astype(np.float32)
    want = exact(x.astype(np.float64))
    error = np.abs(function(x, 3) / want - 1.0)
    assert bound / 2 < error.max() <= bound
    # the same operands give the same result, on the same GPU
    assert (function(x, 3) == function(x, 3)).all()
    assert (function(x, 3) != function(x, 4)).any()
    assert function(np.zeros(1, np.float32), 5)[0] == (1.0 if function is approximate.ex2 else np.inf)


def test_lanes_that_diverge_meet_again():
    body = """
    setp.lt.u32 %p1, %r1, 7;
    mov.u32 %r11, %r1;
    @%p1 bra small;
    again:
    sub.s32 %r11, %r11, 7;
    setp.ge.u32 %p2, %r11, 7;
    @%p2 bra again;
    small:
    shfl.sync.bfly.b32 %r12|%p3, %r11, 1, 31, -1;
    st.global.u32 [%d5], %r12;
    """
    assert torch.equal(execute(body, numbers(64)), (numbers() % 7).view(-1, 2).flip(1).reshape(-1).repeat(2))


def test_braces_open_scopes_for_registers_and_labels():
    body = "mov.u32 %r11, 0;\n" + """
    { .reg .pred done; .reg .b32 %r<3>; mov.u32 %r2, 5;
      again: add.s32 %r11, %r11, 1; setp.ge.u32 done, %r11, %r2; @!done bra again; }
    """ * 2 + "st.global.u32 [%d5], %r11;"  # fmt: skip
    assert (execute(body, numbers()) == 6).all()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("add.s64 %d4, %d4, 4; ld.global.u32 %r11, [%d4]; st.global.u32 [%d5], %r11;", "read out of bounds in global"),
        ("add.s64 %d5, %d5, -4; st.global.u32 [%d5], %r1;", "write out of bounds in global"),
        ("st.global.u32 [%d4], %r1;", "write out of bounds in global"),
        ("cvt.u32.u64 %r11, %d5; cvt.u64.u32 %d5, %r11; st.global.u32 [%d5], %r1;", "write out of bounds in global"),
        ("ld.global.u16 %h1, [%d4+1]; st.global.u16 [%d5], %h1;", "misaligned access of 2 bytes to global"),
        ("ld.shared.u32 %r11, [%r20+4096]; st.global.u32 [%d5], %r11;", "out of bounds in shared"),
        ("ld.shared.v4.u32 {%r11, %r12, %r13, %r14}, [%r20+4]; st.global.u32 [%d5], %r11;", "misaligned access of 16"),
        ("mov.u32 %r11, 0; st.shared.u32 [%r11], %r1;", "out of bounds in shared"),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 bra end; bar.sync 0; end:", "a block barrier in divergent code"),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 bra end; shfl.sync.bfly.b32 %r11, %r1, 1, 31, -1; end:", "a shuffle in diver"),
        ("setp.eq.u32 %p1, %r1, 3; @!%p1 bra end; ret; end: bar.sync 0;", "an exit in divergent code"),
        ("shr.u32 %r11, %r1, 5; setp.eq.u32 %p1, %r11, 1; @%p1 bra end; bar.sync 0; end:", "all threads wait"),
        ("mbarrier.arrive.expect_tx.shared.b64 _, [%r20], 16;", "an mbarrier that was not initialised"),
        ("barrier.cluster.wait.acquire;", "a wait at the cluster barrier without an arrival"),
        ("trap;", "a trap"),
    ],
)
def test_mistakes_are_faults(body, words):
    with pytest.raises(Fault, match=words):
        execute(body, numbers(64), threads=64)


def test_what_it_does_not_know_is_refused():
    with pytest.raises(Unknown, match="red.global.add.u32"):
        execute("red.global.add.u32 [%d5], 1;", numbers())


COPY = """
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra started;
    mbarrier.init.shared::cta.b64 [%r20], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {bytes};
    add.s32 %r11, %r20, 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%d1], {size}, [%r20];
    started:
    bar.sync 0;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0;
    @!%p2 bra again;
    shl.b32 %r12, %r1, 2;
    add.s32 %r12, %r12, %r20;
    ld.shared.u32 %r13, [%r12+128];
    st.global.u32 [%d5], %r13;
"""


@pytest.mark.parametrize("seed", range(12))
def test_a_bulk_copy_is_there_when_it_was_waited_for(seed):
    body = COPY.format(bytes=256, size=256)
    assert torch.equal(execute(body, numbers(64), threads=64, seed=seed), numbers(64))


@pytest.mark.parametrize(
    ("bytes", "size", "words"),
    [(272, 256, "all threads wait"), (256, 512, "out of bounds in global"), (8, 8, "aligned 16 bytes")],
)
def test_a_bulk_copy_of_another_size_is_a_fault(bytes, size, words):
    with pytest.raises(Fault, match=words):
        execute(COPY.format(bytes=bytes, size=size), numbers(64), threads=64)


PEER = """
    mov.u32 %r5, %cluster_ctarank;
    add.s32 %r11, %r4, 100;
    shl.b32 %r12, %r1, 2;
    add.s32 %r12, %r12, %r20;
    st.shared.u32 [%r12], %r11;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    xor.b32 %r6, %r5, 1;
    mapa.shared::cluster.u32 %r13, %r12, %r6;
    ld.shared::cluster.u32 %r14, [%r13];
    st.global.u32 [%d5], %r14;
    barrier.cluster.arrive;
    barrier.cluster.wait;
"""


@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_a_cluster_read_each_other(seed):
    want = numbers(128).view(2, 2, 32).flip(1).reshape(-1) + 100
    assert torch.equal(execute(PEER, numbers(128), cluster=2, seed=seed), want)


def faults_or_differs(body: str) -> bool:
    want = execute(PEER, numbers(128), cluster=2)
    for seed in range(12):
        try:
            if not torch.equal(execute(body, numbers(128), cluster=2, seed=seed), want):
                return True
        except Fault:
            return True
    return False


def test_a_block_must_not_end_before_others_have_read_its_memory():
    assert faults_or_differs(PEER[: PEER.index("barrier.cluster.arrive;")])


def test_writes_must_be_released_to_be_seen_by_another_block():
    assert faults_or_differs(PEER.replace("arrive.release", "arrive.relaxed"))


def test_a_race_is_a_fault_in_any_order():
    body = """
    shl.b32 %r12, %r1, 2;
    add.s32 %r12, %r12, %r20;
    st.shared.u32 [%r12], %r1;
    {barrier}
    xor.b32 %r13, %r12, {other};
    ld.shared.u32 %r14, [%r13];
    st.global.u32 [%d5], %r14;
    """
    for seed in range(4):
        # the neighbour is in the same warp
        execute(body.format(barrier="", other=4), numbers(64), threads=64, seed=seed)
        want = numbers(64) ^ 32
        assert torch.equal(execute(body.format(barrier="bar.sync 0;", other=128), numbers(64), 64, seed=seed), want)
        with pytest.raises(Fault, match="a data race"):
            execute(body.format(barrier="", other=128), numbers(64), threads=64, seed=seed)


def test_instructions_count_for_the_lanes_of_their_warps():
    body = """
    setp.lt.u32 %p1, %r1, 40;
    @!%p1 bra end;
    ld.global.u32 %r11, [%d4];
    ld.global.u32 %r12, [%d1];
    rcp.rn.f32 %f1, %f1;
    end:
    """
    base = counted("", numbers(64), threads=64)[1]
    found = counted(body, numbers(64), threads=64)[1]
    # two instructions of both warps, and three of both, in one of which 8 lanes take part
    assert found.instructions - base.instructions == 64 * 5
    assert found.special == 64
    # the second load is the same place for a warp
    assert found.read - base.read == 40 * 4 + 2 * 4
