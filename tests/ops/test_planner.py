"""Properties of routes over all shapes: rows fit, memory is bounded, explanations are of the route that is taken."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_po.ops import linear_token_stats
from fused_po.ops.explain import explain
from fused_po.ops.gradients import Wanted
from fused_po.ops.peaks import peak
from fused_po.ops.routes import Route
from fused_po.ops.sizes import Sizes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
sizes = st.builds(
    Sizes,
    hidden=st.sampled_from([8, 64, 512, 4096]),
    vocab=st.sampled_from([37, 1000, 32001, 131072, 248320]),
    compute=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    wanted=st.builds(Wanted, st.booleans(), st.booleans(), st.booleans()),
    scratch=st.sampled_from([0, 1000, 1 << 16, 1 << 20, 96 << 20, 1 << 30]),
    hides=st.booleans(),
    drops=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(sizes, st.integers(1, 300_000), st.booleans(), st.booleans(), st.booleans())
def test_rows_fit(shape, rows, fused, unscaled, several):
    route = Route.of(shape, rows, fused=fused, unscaled=unscaled)
    assert 0 <= route.keeps(rows, several) <= rows
    for block, columns in (route.shape(rows), route.again(rows)):
        assert block >= 1 and 1 <= columns <= shape.vocab
    assert route.chunk_rows(rows) >= 1
    assert route.tile >= 1 and route.product_rows >= 1


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([64, 512, 4096]),
    st.sampled_from([1000, 32001, 131072]),
    st.sampled_from(DTYPES),
    st.sampled_from([64 << 20, 1 << 30]),
    st.integers(1, 300_000),
    st.booleans(),
)
def test_memory_is_bounded(hidden, vocab, dtype, scratch, rows, fused):
    shape = Sizes(hidden, vocab, dtype, dtype, Wanted(True, True, False), scratch, dtype == torch.float32)
    route = Route.of(shape, rows, fused=fused, unscaled=fused)
    most = peak(route, rows, fused=fused, plain=True, widens=False)
    returned = dtype.itemsize * hidden * (rows + vocab)
    # hidden states on their way to a product, and float16's dH in float32, are as long as the call
    per_row = rows * hidden * 8
    row = 4 * vocab + 64 * hidden
    assert most.total - returned <= scratch + shape.accumulator + per_row + 128 * row


def test_a_call_between_what_fits_alone_and_beside_others():
    """A length at which more rows would fit beside others than are there."""
    torch.manual_seed(0)
    for rows in (435, 448, 461, 480):
        hidden = torch.randn(1, rows, 32).bfloat16().requires_grad_()
        weight = torch.randn(1000, 32).bfloat16().requires_grad_()
        labels = torch.randint(0, 1000, (1, rows))
        linear_token_stats(hidden, weight, labels, scratch_bytes=1_000_000).logp.sum().backward()
        assert bool(weight.grad.isfinite().all()) and bool((hidden.grad != 0).any(-1).all())


def test_explained_is_what_is_done_where_chunks_are_dearer_than_logits_made_again():
    text = explain(8192, 896, 131072, weight_dtype=torch.float32, scratch_bytes=16 << 20)
    assert "made again in backward" in text and "chunks" not in text


def test_small_budgets_do_not_go_row_by_row():
    shape = Sizes(512, 2000, torch.float32, torch.float32, Wanted(True, True, False), 1 << 20, True)
    block, columns = Route.of(shape, 600, fused=False, unscaled=False).again(600)
    assert block * columns >= 8 * 128
