"""``max_dropped_mass``: what a row may lose of its gradient, and nothing else."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from fused_po import losses
from fused_po.kernels import blocks
from fused_po.ops import linear_loss
from fused_po.ops.checks import TRACES
from fused_po.ops.gradients import Wanted
from fused_po.ops.routes import Route
from fused_po.ops.sizes import Sizes
from tests.interpreted import skip_unless_interpreted
from tests.ops.problems import CountGemms, relative_error

N, V = 48, 2048
TAU = 1e-3


def rows(peaked: bool, dtype: torch.dtype = torch.float64):
    """Hidden states that are the logits, for a head that is the identity: dH is then the gradient tile."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, N // 4, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (4, N // 4), generator=generator)
    labels[0, :3] = -100
    if peaked:
        for _ in range(5):
            place = torch.randint(V, (4, N // 4, 1), generator=generator)
            logits.scatter_add_(2, place, torch.full((4, N // 4, 1), 16.0, dtype=torch.float64))
    hidden, weight = logits.to(dtype).requires_grad_(), torch.eye(V, dtype=dtype).requires_grad_()
    return hidden, weight, labels


def gradients(peaked: bool, tau: float, loss: losses.Loss, frozen: bool = False, scratch: int = 1 << 26, **inputs):
    hidden, weight, labels = rows(peaked)
    weight.requires_grad_(not frozen)
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=not frozen)
    out = linear_loss(
        hidden, weight, labels, loss, bias=bias, max_dropped_mass=tau, scratch_bytes=scratch, softcap=40.0, **inputs
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad, bias.grad


CALLS = {
    "sigmoid": (losses.create("sigmoid"), {"ref_logp": torch.tensor([-100.0, -90.0, -80.0, -95.0])}),
    "ppo": (losses.create("ppo", entropy_coef=0.01), {"advantage": torch.tensor([1.0, -0.5, 0.7, -1.0])}),
}


PLENTY = 1 << 26
BOUNDED = [(name, frozen, scratch) for name in CALLS for frozen in (False, True) for scratch in (0, PLENTY)]
# without room dW, as large as the logits of 2,048 rows, is read and written for each row of a pair
BOUNDED.remove(("sigmoid", False, 0))
SLOW = pytest.param("sigmoid", False, 0, marks=pytest.mark.nightly)


@pytest.mark.parametrize(("name", "frozen", "scratch"), [*BOUNDED, SLOW])
def test_each_row_loses_at_most_the_bound(name, frozen, scratch):
    loss, inputs = CALLS[name]
    exact, dh, dw, db = gradients(True, 0.0, loss, frozen, scratch, **inputs)
    found, got_dh, got_dw, got_db = gradients(True, TAU, loss, frozen, scratch, **inputs)
    assert torch.equal(found.loss, exact.loss)
    assert torch.equal(found.stats.logp, exact.stats.logp)
    mass, lost = dh.abs().sum(2), (dh - got_dh).abs().sum(2)
    assert bool((lost <= TAU * mass + 1e-15).all())
    # something is dropped, and dropped entries are exactly 0
    assert float(lost.max()) > 0
    assert bool(((got_dh == 0) | ((got_dh - dh).abs() <= 1e-12)).all())
    if not frozen:
        # of the same rows the same blocks
        assert 0 < relative_error(got_dw, dw) < 10 * TAU
        assert relative_error(got_db, db) < 1e-12


def test_flat_rows_lose_next_to_nothing():
    loss, inputs = CALLS["sigmoid"]
    _, dh, dw, _ = gradients(False, TAU / 10, loss, **inputs)
    _, exact_dh, exact_dw, _ = gradients(False, 0.0, loss, **inputs)
    assert relative_error(dh, exact_dh) < 1e-12 and relative_error(dw, exact_dw) < 1e-12


def test_peaked_rows_keep_few_blocks(monkeypatch):
    loss, inputs = CALLS["sigmoid"]
    kept = []

    def recorded(*arguments):
        kept.append(blocks.choose(*arguments))
        return kept[-1]

    monkeypatch.setattr("fused_po.ops.head.choose", recorded)
    hidden, weight, labels = rows(True)
    with CountGemms(labels, V, V) as count:
        linear_loss(hidden, weight, labels, loss, max_dropped_mass=TAU, **inputs).loss.backward()
    # GEMM 1 alone in full
    assert count.gemms == pytest.approx(1, rel=1e-9)
    share = torch.cat(kept).double().mean()
    assert sum(k.shape[0] for k in kept) == int((labels >= 0).sum())
    # six places a row, and eight blocks
    assert 0.1 < float(share) < 0.7


def test_zero_is_the_exact_path():
    loss, inputs = CALLS["sigmoid"]
    hidden, weight, labels = rows(True)
    with CountGemms(labels, V, V) as count:
        linear_loss(hidden, weight, labels, loss, max_dropped_mass=0.0, **inputs).loss.backward()
    assert count.gemms == pytest.approx(3, rel=1e-9)


NIGHTLY = [("triton", torch.float32), ("triton", torch.float16)]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((None, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ("triton", torch.bfloat16),
        # interpreted
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY),
    ],
)
def test_other_dtypes_and_the_other_backend(dtype, backend):
    if backend == "triton":
        skip_unless_interpreted()
    hidden, weight, labels = rows(True, dtype)
    loss, inputs = CALLS["sigmoid"]

    def gradient(tau):
        out = linear_loss(hidden, weight, labels, loss, max_dropped_mass=tau, backend=backend, **inputs)
        return torch.autograd.grad(out.loss, [hidden, weight])

    for got, exact in zip(gradient(TAU), gradient(0.0), strict=True):
        assert relative_error(got, exact) < 2 * TAU
    dh, exact = gradient(TAU)[0].double(), gradient(0.0)[0].double()
    slack = 4 * torch.finfo(dtype).eps * exact.abs().sum(2)
    assert bool(((dh - exact).abs().sum(2) <= TAU * exact.abs().sum(2) + slack).all())


@pytest.mark.skipif(not TRACES, reason="linear_loss does not trace before torch 2.13")
def test_it_traces():
    loss, inputs = CALLS["sigmoid"]
    hidden, weight, labels = rows(True, torch.float32)

    def call(hidden, weight):
        return linear_loss(hidden, weight, labels, loss, max_dropped_mass=TAU, **inputs).loss

    want = torch.autograd.grad(call(hidden, weight), [hidden, weight])
    got = torch.autograd.grad(
        torch.compile(call, backend="aot_eager", fullgraph=True)(hidden, weight), [hidden, weight]
    )
    for mine, truth in zip(got, want, strict=True):
        assert relative_error(mine, truth) < 1e-5


@pytest.mark.parametrize("tau", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(tau):
    with pytest.raises(ValueError, match="max_dropped_mass must lie in"):
        gradients(True, tau, CALLS["sigmoid"][0], **CALLS["sigmoid"][1])


def test_it_does_not_go_with_split_gradients():
    hidden, weight, labels = rows(True)
    with pytest.raises(ValueError, match="does not go with split_gradients"):
        linear_loss(
            hidden,
            weight,
            labels,
            CALLS["sigmoid"][0],
            max_dropped_mass=TAU,
            split_gradients=True,
            **CALLS["sigmoid"][1],
        )


@pytest.mark.parametrize("scratch", [0, 1 << 26])
def test_where_no_block_is_left_out_nothing_changes(monkeypatch, scratch):
    """As on a GPU without a named backend."""
    loss, inputs = CALLS["sigmoid" if scratch else "ppo"]
    _, *exact = gradients(True, 0.0, loss, False, scratch, **inputs)
    monkeypatch.setattr(import_module("fused_po.ops.linear_loss"), "leaves_out", lambda *_: False)
    _, *found = gradients(True, TAU, loss, False, scratch, **inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_rows_that_are_made_again_go_many_at_a_time():
    """A row's whole vocabulary at once, and as many rows as the budget holds."""
    sizes = Sizes(64, 2000, torch.float32, torch.float32, Wanted(True, True, False), 1 << 20, True, True)
    block, columns = Route.of(sizes, 600, fused=True, unscaled=True).again(600)
    assert columns == 2000 and block >= 10
