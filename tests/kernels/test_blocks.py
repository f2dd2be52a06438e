"""Which blocks of a gradient tile count, and products with those that do, for every backend."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fused_po.kernels import blocks
from fused_po.testing import assert_accurate
from tests.kernels.test_rows import FLOATS, interpreted_or_skip
from tests.losses.test_determinism import ATOMIC, Recorder

BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted"),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
]
TAU = 1e-2


def peaked(count: int, vocab: int, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Gradient tiles (R, V) in float64 whose rows have most of their mass in a few places of their own."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    for _ in range(8):
        logits.scatter_add_(
            1, torch.randint(vocab, (count, 1), generator=generator), torch.full((count, 1), 14.0).double()
        )
    labels = torch.randint(vocab, (count, 1), generator=generator)
    return torch.nn.functional.one_hot(labels.squeeze(1), vocab) - logits.softmax(1)


def dropped(tile: Tensor, kept: Tensor, group: int, width: int) -> Tensor:
    """The share of the L1 mass that each row loses, (R,), entry by entry."""
    rows = torch.arange(tile.shape[0]) // group
    columns = torch.arange(tile.shape[1]) // width
    lost = torch.where(kept[rows][:, columns], 0.0, tile.double().abs()).sum(1)
    return lost / tile.double().abs().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("group", "width"), [(1, 256), (64, 128), (3, 100)])
def test_no_row_loses_more_than_the_bound(dtype, group, width):
    tile = peaked(70, 2000).to(dtype)
    kept = blocks.kept_blocks(tile, TAU, group, width)
    assert kept.shape == (-(-70 // group), -(-2000 // width))
    lost = dropped(tile, kept, group, width)
    assert float(lost.max()) <= TAU
    # of what may go nearly all goes, where rows decide for themselves
    if group == 1:
        assert float(kept.double().mean()) < 0.7
        assert float(lost.mean()) > TAU / 10


def test_one_more_block_would_break_the_bound():
    """The choice is greedy: with rows on their own the smallest kept block does not fit any more."""
    tile, width = peaked(40, 2000), 128
    kept = blocks.kept_blocks(tile, TAU, 1, width)
    for row in range(40):
        masses = torch.stack([part.abs().sum() for part in tile[row].split(width)])
        share = masses / masses.sum()
        smallest = float(share[kept[row]].min())
        assert float(share[~kept[row]].sum()) + smallest > TAU


def test_slabs_do_not_matter(monkeypatch):
    tile = peaked(300, 1000)
    whole = blocks.kept_blocks(tile, TAU, 64, 128)
    monkeypatch.setattr(blocks, "SLAB", 128)
    assert torch.equal(blocks.kept_blocks(tile, TAU, 64, 128), whole)


def test_flat_rows_keep_what_a_threshold_would_drop():
    """Every entry is far below 2^-12, the threshold of Cut Cross-Entropy."""
    vocab = 100_000
    tile = -torch.full((2, vocab), 1.0 / vocab)
    kept = blocks.kept_blocks(tile, 1e-3, 1, 256)
    assert float(kept.double().mean()) >= 0.998


def test_rows_that_are_nothing_or_not_finite():
    tile = peaked(4, 1000).float()
    tile[0] = 0.0
    tile[1, 700] = torch.nan
    tile[2, 3] = torch.inf
    kept = blocks.kept_blocks(tile, TAU, 1, 100)
    assert not kept[0].any()
    assert kept[1].all() and kept[2].all()
    assert kept[3].any() and not kept[3].all()


def test_deterministic_mode_refuses_nothing():
    """No sum of floats in an order that torch does not promise on a GPU: the operations that run are looked at."""
    tile = peaked(70, 2000).float()
    with Recorder() as recorder:
        blocks.kept_blocks(tile, TAU, 64, 128)
    assert "linalg_vector_norm" in recorder.names
    assert recorder.names.isdisjoint(ATOMIC)


def test_on_a_gpu_nothing_is_dropped_unless_a_backend_is_named(monkeypatch, caplog):
    monkeypatch.delenv("FUSED_PO_BACKEND", raising=False)
    blocks._tell_that_nothing_is_dropped.cache_clear()
    gpu = torch.device("cuda")
    assert not blocks.leaves_out(gpu, None)
    assert not blocks.leaves_out(gpu, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "max_dropped_mass is left unused on a GPU" in caplog.text
    assert blocks.leaves_out(gpu, "triton") and blocks.leaves_out(torch.device("cpu"), None)
    monkeypatch.setenv("FUSED_PO_BACKEND", "triton")
    assert blocks.leaves_out(gpu, None)


def test_no_row_and_one_column():
    assert blocks.kept_blocks(torch.zeros(0, 1000), TAU, 64, 128).shape == (0, 8)
    assert blocks.kept_blocks(torch.ones(3, 1), TAU, 2, 128).tolist() == [[True], [True]]


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize(("count", "vocab", "hidden"), [(70, 300, 40), (64, 256, 130), (1, 1, 1), (130, 513, 33)])
def test_products(backend, device, element, count, vocab, hidden):
    interpreted_or_skip(backend, device)
    dtype = FLOATS[element]
    module = importlib.import_module(blocks.BACKENDS[backend])
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(count, vocab + 3, generator=generator).to(device, dtype)[:, :vocab]
    # stored wider than the tile: rounded on the way
    weight = torch.randn(vocab, hidden, generator=generator).to(device)
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        # the interpreter cuts bits off where hardware rounds
        weight = weight.to(dtype)
    rows = torch.randn(count, hidden, generator=generator).to(device, dtype)
    shape = (-(-count // module.GROUP), -(-vocab // module.WIDTH))
    kept = (torch.rand(shape, generator=generator) < 0.6).to(device)
    groups = torch.arange(count, device=device) // module.GROUP
    columns = torch.arange(vocab, device=device) // module.WIDTH
    left = torch.where(kept[groups][:, columns], tile, 0.0)

    got = blocks.block_mm(tile, weight, kept, torch.float32, backend)
    rounded = weight.to(dtype)
    assert_accurate(got, left.float() @ rounded.float(), left.double() @ rounded.double(), "dH")
    before = torch.randn(vocab, hidden, generator=generator).to(device)
    grad = before.clone()
    blocks.block_mm_t(tile, rows, kept, grad, backend)
    naive, truth = before + left.float().t() @ rows.float(), before.double() + left.double().t() @ rows.double()
    assert_accurate(grad, naive, truth, "dW")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_what_is_dropped_is_not_read(backend, device):
    """Poisoned blocks that nobody keeps change nothing."""
    interpreted_or_skip(backend, device)
    module = importlib.import_module(blocks.BACKENDS[backend])
    vocab, count = 3 * module.WIDTH, 2 * module.GROUP
    tile, weight = torch.randn(count, vocab, device=device), torch.randn(vocab, 16, device=device)
    rows = torch.randn(count, 16, device=device)
    kept = torch.ones(2, 3, dtype=torch.bool, device=device)
    kept[:, 1] = False
    middle = slice(module.WIDTH, 2 * module.WIDTH)
    clean = tile.clone()
    clean[:, middle] = 0.0
    tile[:, middle], weight[middle] = torch.nan, torch.nan
    torch.testing.assert_close(
        blocks.block_mm(tile, weight, kept, torch.float32, backend),
        clean @ weight.nan_to_num(0.0),
        rtol=1e-4,
        atol=1e-4,
    )
    grad = torch.zeros(vocab, 16, device=device)
    blocks.block_mm_t(tile, rows, kept, grad, backend)
    torch.testing.assert_close(grad, clean.t() @ rows, rtol=1e-4, atol=1e-4)


def test_opcheck():
    torch.library.opcheck(torch.ops.fused_po.kept_blocks, (torch.randn(3, 600), TAU, None))
    kept, tile = torch.tensor([[True], [False], [True]]), torch.randn(3, 8)
    arguments = (tile, torch.randn(8, 4), kept, torch.empty(3, 4), "reference")
    # what an output held before is not read: the check compares uninitialised memory otherwise
    torch.library.opcheck(torch.ops.fused_po.block_mm, arguments)
    torch.library.opcheck(
        torch.ops.fused_po.block_mm_t, (tile, torch.randn(3, 4), kept, torch.zeros(8, 4), "reference")
    )


def test_a_backend_without_such_products_is_refused():
    with pytest.raises(
        ValueError, match="backend 'cuda' has no block_mm: leave the choice, or take triton or reference"
    ):
        blocks.choose(torch.randn(3, 8), TAU, "cuda")
    assert blocks.choose(torch.randn(3, 8), TAU, None).shape == (3, 1)
