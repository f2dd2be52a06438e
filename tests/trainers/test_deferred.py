"""Logits that are not made until somebody needs them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.logits import Methods
from fused_po.trainers.seam import Calls, putting_off, standing_in

LAYER = nn.Linear(16, 11)
HIDDEN = torch.randn(2, 5, 16)
LABELS = torch.randint(11, (2, 5))


def put_off(hidden: torch.Tensor) -> Any:
    with standing_in(LAYER, putting_off({}, lambda: None, Calls())):
        return LAYER(hidden)


def _written(z: Any) -> Any:
    z = 2.0 * z
    z[:, 1, 3:5] = -5.0
    z += torch.linspace(1, 2, 11)
    return z / 2.0


def _written_through_a_view(z: Any) -> Any:
    z = 1.0 * z
    part = z[:, 1:]
    part.clamp_(max=0.1)
    return z


CHANGES = {
    "slice": lambda z: z[:, 1:-1],
    "ellipsis": lambda z: z[..., :-1, :],
    "one class": lambda z: z[:, :, 3],
    "mask": lambda z: z[LABELS > 4],
    "new axis": lambda z: z[None],
    "scaled": lambda z: z / 0.7,
    "scaled twice": lambda z: (2 * z) * 0.3,
    "capped": lambda z: torch.tanh(z / 3.0) * 3.0 / 0.9,
    "by a tensor": lambda z: z * torch.linspace(1, 2, 11),
    "chunk": lambda z: z.chunk(2, dim=0)[1],
    "chunk of classes": lambda z: z.chunk(2, dim=-1)[1],
    "flat": lambda z: torch.flatten(z, end_dim=1),
    "view": lambda z: z.view(-1, z.shape[-1]),
    "view of classes": lambda z: z.view(2, 55),
    "double": lambda z: z.to(torch.float64),
    "split": lambda z: z.split(1, dim=0)[1],
    "first classes": lambda z: z[..., :7],
    "later classes": lambda z: z[..., 3:],
    "unsqueeze": lambda z: z.unsqueeze(1) * 2,
    "by a number first": lambda z: torch.mul(z, 0.5),
    "equal": lambda z: (z == z.amax(-1, keepdim=True)).float() + 0.0 * z,
    "masked": lambda z: z.masked_fill(LABELS[..., None] > 4, 0.0),
    "written": lambda z: _written(z),
    "written through a view": lambda z: _written_through_a_view(z),
    "split of classes": lambda z: z.split([4, 7], dim=-1)[1],
    "nansum": lambda z: (0.5 * z).detach().nansum(),
    "nansum of classes": lambda z: z.detach().nansum(-1),
    "mean": lambda z: z.detach().mean(),
    "mean of capped": lambda z: torch.tanh(z / 3.0).detach().mean(-1),
    "mean of classes": lambda z: z.detach().mean(-1),
    "mean of tokens": lambda z: z.mean(1),
    "argmax": lambda z: z.argmax(-1),
    "log_softmax": lambda z: z.log_softmax(-1) + 0.0,
    "take_along_dim": lambda z: torch.take_along_dim(z.log_softmax(-1), LABELS[..., None], dim=2),
    "gather": lambda z: z.log_softmax(-1).gather(-1, LABELS[..., None]),
    "logsumexp": lambda z: torch.logsumexp(2 * nn.functional.log_softmax(z, dim=-1), dim=-1),
    "cross entropy": lambda z: nn.CrossEntropyLoss()(z.view(-1, 11), LABELS.view(-1)),
    "cross entropy, ignoring": lambda z: nn.CrossEntropyLoss(ignore_index=4)(z.view(-1, 11), LABELS.view(-1)),
    "cross entropy, smoothed": lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(z.view(-1, 11), LABELS.view(-1)),
    "cross entropy, summed": lambda z: nn.CrossEntropyLoss(reduction="sum")(z.view(-1, 11), LABELS.view(-1)),
    "stack": lambda z: torch.stack([z, z + 1.0]),
    "minus": lambda z: 1.0 - z,
}


@pytest.mark.parametrize("name", CHANGES)
def test_deferred_logits_are_logits(name):
    def result(logits: Any) -> Any:
        found = CHANGES[name](logits)
        return found.made() if hasattr(found, "made") else found

    hidden = HIDDEN.clone().requires_grad_()
    want = result(LAYER(hidden))
    got = result(put_off(hidden))
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if want.requires_grad:
        leaves = [hidden, *LAYER.parameters()]
        for mine, truth in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["slice", "ellipsis", "scaled", "scaled twice", "capped", "flat", "view", "chunk", "split"]
)
def test_log_probs_and_entropies_follow_what_was_done(name):
    found = CHANGES[name](put_off(HIDDEN))
    assert isinstance(found, DeferredLogits)
    log_p = CHANGES[name](LAYER(HIDDEN)).log_softmax(-1)
    labels = torch.zeros(log_p.shape[:-1], dtype=torch.int64)
    torch.testing.assert_close(found.logp(labels), log_p[..., 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [*(CHANGES[name] for name in ("scaled", "by a number first", "capped")), lambda z: z.detach().div_(0.7)]
)
def test_what_is_known_of_logits_is_not_known_of_others(change):
    logits = put_off(HIDDEN)
    logits.logp(LABELS)
    found, want = change(logits), change(LAYER(HIDDEN))
    assert isinstance(found, DeferredLogits)
    torch.testing.assert_close(found.mean(-1), want.mean(-1), rtol=1e-5, atol=1e-6)
    entropy = -(want.softmax(-1) * want.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found.entropy(), entropy, rtol=1e-5, atol=1e-6)


def test_the_autocast_of_the_model_is_remembered():
    """accelerate leaves it before the trainer sees the logits."""
    hidden = HIDDEN.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits, want = put_off(hidden), LAYER(hidden)
    assert logits.dtype == want.dtype == torch.bfloat16 and torch.equal(logits.made(), want)
    assert torch.equal(logits.argmax(-1), want.argmax(-1))
    found = logits.logp(LABELS)
    # bfloat16 operands, and products that are not rounded to it
    exact = (hidden.bfloat16().double() @ LAYER.weight.bfloat16().double().t() + LAYER.bias.double()).log_softmax(-1)
    exact = exact.gather(-1, LABELS[..., None])[..., 0]
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)
    plain = LAYER(HIDDEN).log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    assert (found - plain).abs().max() > 1e-4


def test_predictions_hold_logits_that_are_there():
    """What a prediction step returns is gathered over ranks and handed to metrics, also where it is inherited."""

    class Base:
        def prediction_step(self, model, hidden):
            return None, {"logits": model.lm_head(hidden)}, LABELS

    class Trainer(Base):
        def __init__(self, model):
            self.model = model

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = LAYER

        def get_output_embeddings(self):
            return self.lm_head

    methods = Methods({}, lambda: None)
    methods.wrap(Trainer, ("prediction_step",))
    model = Model()
    found = Trainer(model).prediction_step(model, HIDDEN)
    assert type(found[1]["logits"]) is torch.Tensor
    torch.testing.assert_close(found[1]["logits"], LAYER(HIDDEN))
    methods.remove()
    assert "prediction_step" not in vars(Trainer)


def test_changes_in_place_are_kept():
    logits = put_off(HIDDEN)
    logits.div_(0.5)
    logits /= 2.0
    assert logits.now is None
    torch.testing.assert_close(logits.made(), LAYER(HIDDEN))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda z: z.clamp(max=1.0), "clamp"),
        (lambda z: torch.where(z > 0, z, 0.0), "__gt__"),
        (lambda z: torch.cat([z, z]), "cat"),
    ],
)
def test_what_is_not_followed_is_made_once_and_named(change, name):
    logits = put_off(HIDDEN)
    with pytest.warns(UserWarning) as caught:
        change(logits)
        kept = logits.now
        assert kept is not None and change(logits) is not None and logits.now is kept
    assert [str(one.message) for one in caught] == [
        f"{name} of a model's logits is not followed: all 2 x 5 x 11 of them are made"
    ]


def test_log_probs_of_all_classes_are_made_once():
    log_p = put_off(HIDDEN).log_softmax(-1)
    with pytest.warns(UserWarning) as caught:
        found = -(log_p.exp() * log_p).sum(-1)
        kept = log_p.now
        assert kept is not None and log_p.exp() is not None and log_p.now is kept
    assert [str(one.message).partition(" of a model's")[0] for one in caught] == ["log_softmax and exp"]
    want = LAYER(HIDDEN).log_softmax(-1)
    torch.testing.assert_close(found, -(want.exp() * want).sum(-1))


def test_log_probs_of_logits_that_were_made():
    """They are those of what was made of them, and have its gradient, also where a log asked first."""
    hidden = HIDDEN.clone().requires_grad_()
    logits = put_off(hidden)
    with pytest.warns(UserWarning, match="max"), torch.no_grad():
        logits.max()
    logits[..., 3] = 2.0
    want = LAYER(hidden).index_fill(-1, torch.tensor([3]), 2.0).log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    found = logits.logp(LABELS)
    torch.testing.assert_close(found, want)
    for mine, truth in zip(
        torch.autograd.grad(found.sum(), [hidden, LAYER.weight]),
        torch.autograd.grad(want.sum(), [hidden, LAYER.weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_what_can_be_told_without_logits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = put_off(HIDDEN)
        assert logits.size(-1) == 11 and logits.dim() == logits.ndim == 3 and logits.numel() == 110
        assert logits.is_floating_point() and not hasattr(logits, "full_tensor") and len(logits) == 2
        assert logits.to("cpu", non_blocking=True) is logits and logits.to(HIDDEN) is logits


def test_the_mean_is_for_the_log():
    hidden = HIDDEN.clone().requires_grad_()
    found = put_off(hidden).mean()
    with pytest.raises(RuntimeError, match="has no gradient"):
        found.backward()
