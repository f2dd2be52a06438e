"""Half precision and autocast: float32 statistics, and gradients no worse than plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats, token_stats
from fused_po.ops.plain import plain_loss
from fused_po.testing import assert_accurate

B, S, H, V = 4, 48, 32, 500
SCRATCH = {"whole": 1 << 24, "deferred or recomputed": 60_000}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, S, H), torch.randn(V, H) / 3
    labels = torch.randint(0, V, (B, S))
    labels[:, :5] = -100
    return hidden.to(dtype), weight.to(dtype), labels, torch.randn(B) - 300


def gradients(loss, hidden, weight, labels, *, fused, autocast=None, scratch=1 << 24, scale=1.0, **inputs):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        if fused:
            value = linear_loss(hidden, weight, labels, loss, scratch_bytes=scratch, **inputs).loss
        else:
            value = plain_loss(
                (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)), labels, loss, **inputs
            )
    return torch.autograd.grad(value * scale, (hidden, weight))


@DTYPES
@pytest.mark.parametrize("scratch", SCRATCH)
@pytest.mark.parametrize("pairs", [1, 2])
def test_gradients(dtype, scratch, pairs):
    hidden, weight, labels, ref_logp = (t[: 2 * pairs] if t.shape[0] == B else t for t in tensors(dtype))
    loss, inputs = losses.create("sigmoid"), {"ref_logp": ref_logp}
    truth = gradients(loss, hidden.double(), weight.double(), labels, fused=False, **inputs)
    naive = gradients(loss, hidden, weight, labels, fused=False, **inputs)
    found = gradients(loss, hidden, weight, labels, fused=True, scratch=SCRATCH[scratch], **inputs)
    for name, got, plain, want in zip(("dH", "dW"), found, naive, truth, strict=True):
        assert got.dtype == dtype
        assert_accurate(got, plain, want, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_float32_master_weights(dtype):
    hidden, weight, labels, ref_logp = tensors(torch.float32)
    loss, inputs = losses.create("sigmoid"), {"ref_logp": ref_logp}
    truth = gradients(loss, hidden.double(), weight.double(), labels, fused=False, **inputs)
    naive = gradients(loss, hidden, weight, labels, fused=False, autocast=dtype, **inputs)
    for scratch in SCRATCH.values():
        found = gradients(loss, hidden, weight, labels, fused=True, autocast=dtype, scratch=scratch, **inputs)
        for name, got, plain, want in zip(("dH", "dW"), found, naive, truth, strict=True):
            assert got.dtype == torch.float32
            assert_accurate(got, plain, want, name)


def test_tiny_coefficients_survive_float16():
    """Coefficients near 1e-8 would vanish in float16; a loss scale brings the gradient back."""
    hidden, weight, labels, ref_logp = tensors(torch.float16)
    loss, inputs = losses.create("sigmoid", beta=1e-7), {"ref_logp": ref_logp}
    truth = gradients(loss, hidden.double(), weight.double(), labels, fused=False, scale=2.0**16, **inputs)
    for scratch in SCRATCH.values():
        found = gradients(loss, hidden, weight, labels, fused=True, scratch=scratch, scale=2.0**16, **inputs)
        for got, want in zip(found, truth, strict=True):
            error = (got.double() - want).norm() / want.norm()
            # a few units in the last place of float16
            assert error < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_float32_from_float32_logits(dtype):
    """Rounding logits to half precision would put an error of its eps times the logit into every log-prob."""
    hidden, weight, labels, _ = tensors(dtype)
    truth = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    found = linear_token_stats(hidden, weight, labels).logp
    assert found.dtype == torch.float32
    keep = labels >= 0
    assert (found.double() - truth)[keep].abs().max() < 20 * torch.finfo(torch.float32).eps * truth.abs().max()
    logits = (hidden @ weight.t()).requires_grad_()
    stats = token_stats(logits, labels, outputs=("logp", "entropy"))
    assert stats.logp.dtype == stats.entropy.dtype == torch.float32
    (stats.logp.sum() + stats.entropy.sum()).backward()
    assert logits.grad.dtype == dtype


def test_repeat_runs_are_bitwise_equal():
    hidden, weight, labels, ref_logp = tensors(torch.float32)
    loss = losses.create("sigmoid")
    for scratch in SCRATCH.values():
        runs = [
            gradients(loss, hidden, weight, labels, fused=True, scratch=scratch, ref_logp=ref_logp) for _ in range(2)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
