"""Inputs and surroundings that other packages' users met: a sentence or the right value, never a traceback of torch."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch.distributed as dist

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats, stats_loss, token_stats

B, S, H, V = 4, 3, 8, 11
HIDDEN, WEIGHT, LABELS = torch.randn(B, S, H), torch.randn(V, H), torch.randint(0, V, (B, S))
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def loss_of(hidden=HIDDEN, weight=WEIGHT, name: str = "sft", **given):
    return linear_loss(hidden, weight, LABELS, losses.create(name), **given).loss


@pytest.fixture
def mesh():
    if dist.is_initialized():
        pytest.skip("a process group is there already")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_tensor_that_is_spread_over_ranks(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def spread(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    logits = spread(HIDDEN @ WEIGHT.t())
    calls = {
        "weight": lambda: loss_of(weight=spread(WEIGHT)),
        "hidden": lambda: linear_token_stats(spread(HIDDEN), WEIGHT, LABELS),
        "logits": lambda: token_stats(logits, LABELS),
        "logp": lambda: stats_loss(token_stats(logits.to_local(), LABELS).__class__(logp=logits[..., 0]), LABELS, SFT),
        "ref_logp": lambda: loss_of(name="sigmoid", ref_logp=spread(torch.zeros(B))),
        "temperature": lambda: loss_of(temperature=spread(torch.ones(B))),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name} is a DTensor, spread over ranks: give {name}.full_tensor"):
            call()
    assert torch.equal(loss_of(weight=spread(WEIGHT).full_tensor()), loss_of())


SFT = losses.create("sft")


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8(dtype):
    calls = {
        "weight": lambda: loss_of(weight=WEIGHT.to(dtype)),
        "hidden": lambda: linear_token_stats(HIDDEN.to(dtype), WEIGHT, LABELS),
        "bias": lambda: loss_of(bias=torch.zeros(V).to(dtype)),
        "logits": lambda: token_stats((HIDDEN @ WEIGHT.t()).to(dtype), LABELS),
        "ref_logp": lambda: loss_of(name="sigmoid", ref_logp=torch.zeros(B).to(dtype)),
        "temperature": lambda: loss_of(temperature=torch.ones(B).to(dtype)),
    }
    for name, call in calls.items():
        message = f"{name} must be float16, bfloat16, float32 or float64: got {dtype}"
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("number", [float("nan"), -1.0, -3, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["num_items", "num_sequences"])
def test_normalisers_that_are_no_count(name, number):
    for given in (number, torch.tensor(number), torch.tensor([number])):
        with pytest.raises(ValueError, match=f"{name} must be above 0: got"):
            loss_of(**{name: given})
    assert torch.equal(loss_of(**{name: torch.tensor(0)}), loss_of(**{name: 1}))


def test_a_normaliser_that_can_not_be_looked_at(monkeypatch):
    """On a GPU it would wait: there the loss is NaN, and not that of a count of 1."""
    from importlib import import_module

    monkeypatch.setattr(import_module("fused_po.ops.batches"), "looks_at", lambda tensor: False)
    for number in (float("nan"), -3.0, float("inf")):
        assert loss_of(num_items=torch.tensor(number)).isnan()


def through(pack, unpack):
    hidden = HIDDEN.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss_of(hidden).backward()
    return hidden.grad


class Callable:
    def __call__(self, tensor):
        return tensor


def test_hooks_of_any_kind():
    want = through(lambda t: t, lambda t: t)
    # a method of a C type and a partial have no __module__ of their own
    for pack in (torch.Tensor.clone, partial(torch.add, 0), Callable()):
        assert torch.equal(through(pack, lambda t: t), want)


def test_saved_tensor_hooks_may_be_disabled():
    want = loss_of()
    leaf = HIDDEN.clone().requires_grad_()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        found = loss_of(leaf)
        other = stats_loss(linear_token_stats(leaf, WEIGHT, LABELS, outputs=SFT.statistics), LABELS, SFT).loss
    assert torch.equal(found.detach(), want)
    torch.testing.assert_close(other.detach(), want)
    found.backward()


@pytest.mark.parametrize("parts", [True, "sides", "thirds"])
def test_parts_in_inference_mode(parts):
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="differentiates the loss, which torch.inference_mode forbids"),
    ):
        loss_of(name="sigmoid", ref_logp=torch.zeros(B), split_gradients=parts)
