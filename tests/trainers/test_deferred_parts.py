"""Logits that are not made, in parts and in place: what tensors share they share, and what tensors take they take."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.trl import older
from tests.trainers.test_deferred import HIDDEN, LABELS, LAYER, put_off


def _both(change: Any, hidden: torch.Tensor = HIDDEN) -> list[Any]:
    """What changes to deferred logits and to real ones return."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [change(logits) for logits in (put_off(hidden), LAYER(hidden))]


def _log_probs(logits: Any, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _part_then_all(z: Any) -> torch.Tensor:
    z[:, :-1].div_(0.25)
    return _log_probs(z)


def _all_then_part(z: Any) -> torch.Tensor:
    part = z[:, :-1]
    z.div_(0.25)
    return _log_probs(part, LABELS[:, :-1])


def _flat_then_all(z: Any) -> torch.Tensor:
    z.view(-1, 11).mul_(4.0)
    return _log_probs(z)


def _beside(z: Any) -> torch.Tensor:
    part, other = z[:, :-1], z[:, 1:]
    part *= 4.0
    return torch.stack([_log_probs(part, LABELS[:, :-1]), _log_probs(other, LABELS[:, 1:])])


def _looked_at(z: Any) -> torch.Tensor:
    part = z[:, :-1]
    part.max()
    part.mul_(4.0)
    return _log_probs(z)


def _some_classes(z: Any) -> torch.Tensor:
    z[..., :7].mul_(4.0)
    return _log_probs(z)


def _whole_later(z: Any) -> torch.Tensor:
    part = z[:, 1:]
    part.mul_(4.0)
    z.clamp_(max=0.1)
    return _log_probs(part, LABELS[:, 1:])


def _chunks(z: Any) -> torch.Tensor:
    for part in z.detach().chunk(2, dim=-2):
        part.mul_(3.0)
    return _log_probs(z)


def _copies(z: Any) -> torch.Tensor:
    copies = [z[LABELS >= 0], z[:, 1:].reshape(-1, 11), z[:, 1:].contiguous(), z[[0, 1]], 1.0 * z, z.log_softmax(-1)]
    for copy in copies[:-1]:
        copy.mul_(4.0)
    z.mul_(2.0)
    found = [*(copy.log_softmax(-1) for copy in copies[:-1]), copies[-1], z.log_softmax(-1)]
    return torch.cat([one.reshape(-1, 11).logsumexp(-1) + one.reshape(-1, 11)[:, 3] for one in found])


WRITTEN = (_part_then_all, _all_then_part, _flat_then_all, _beside, _looked_at, _some_classes)


@pytest.mark.parametrize("hidden", [HIDDEN, torch.randn(2, 7, 16)[:, 1:-1]], ids=["whole", "some positions"])
@pytest.mark.parametrize("change", [*WRITTEN, _whole_later, _chunks, _copies])
def test_views_share_what_is_written(change, hidden):
    found, want = _both(change, hidden)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_gradients_through_a_write_into_a_part():
    def gradients(logits: Any, hidden: torch.Tensor) -> Any:
        part = logits[:, :-1]
        part.mul_(4.0)
        total = (_log_probs(logits) ** 2).sum() + _log_probs(part, LABELS[:, :-1]).sum()
        return torch.autograd.grad(total, [hidden, *LAYER.parameters()])

    hidden = HIDDEN.clone().requires_grad_()
    with pytest.warns(UserWarning, match="in place on a part of a model's logits is not followed"):
        found = gradients(put_off(hidden), hidden)
    for mine, truth in zip(found, gradients(LAYER(hidden), hidden), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_a_temperature_in_place_needs_no_logits():
    """As trainers write it: the first logits are there no more, or nobody looks at them again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = put_off(HIDDEN)
        part = whole[:, :-1]
        part.div_(0.7)
        assert part.now is None
        found = part[:, 1:].logp(LABELS[:, 1:-1])
    torch.testing.assert_close(found, _log_probs(LAYER(HIDDEN)[:, 1:-1] / 0.7, LABELS[:, 1:-1]))


@pytest.mark.parametrize(
    "part",
    [
        lambda z: z.chunk(2, dim=-2)[0],
        lambda z: z.split(2, dim=-2)[1],
        lambda z: z.split([1, 1], dim=-3)[1],
        lambda z: z.flatten(-3, -2),
        lambda z: z[..., 1:, :],
    ],
)
def test_what_is_known_of_rows_follows_them(part):
    def change(logits: Any) -> Any:
        if isinstance(logits, DeferredLogits):
            logits.logp(LABELS)
        return part(logits).mean(-1)

    # as many tokens as sequences: a wrong dimension has the right size
    found, want = _both(change)
    assert found.shape == want.shape
    torch.testing.assert_close(found, want)


def test_labels_of_another_shape():
    logits = put_off(HIDDEN)
    found = logits.logp(LABELS.flatten())
    torch.testing.assert_close(found, _log_probs(LAYER(HIDDEN)).flatten())
    torch.testing.assert_close(logits[:, 1:].mean(-1), LAYER(HIDDEN)[:, 1:].mean(-1))


def test_ignored_rows_are_not_known():
    labels = LABELS.clone()
    labels[:, :3] = -100
    want = LAYER(HIDDEN)
    entropy = -(want.softmax(-1) * want.log_softmax(-1)).sum(-1)
    logits = put_off(HIDDEN)
    assert not logits.logp(labels)[:, :3].any()
    torch.testing.assert_close(logits[:, 3:].entropy(), entropy[:, 3:])
    torch.testing.assert_close(logits.mean(), want.mean())
    torch.testing.assert_close(logits.entropy(), entropy)
    flat = put_off(HIDDEN).view(-1, 11)
    nn.functional.cross_entropy(flat, labels.view(-1))
    torch.testing.assert_close(flat.mean(), want.mean())


def test_rows_that_trl_masks_are_not_known():
    logits, mask = put_off(HIDDEN), LABELS > 4
    function = older._FUNCTIONS["selective_log_softmax_and_entropy"](None)
    with torch.no_grad():
        logp, entropy = function(logits, LABELS, row_mask=mask)
        want = LAYER(HIDDEN)
        truth = -(want.softmax(-1) * want.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(logp, _log_probs(want) * mask)
        torch.testing.assert_close(entropy, truth * mask)
        torch.testing.assert_close(logits.entropy(), truth)


def test_entropies_are_those_of_the_logits_as_they_are():
    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    hidden = HIDDEN.clone().requires_grad_()
    logits, want = put_off(hidden), LAYER(hidden)
    with torch.no_grad():
        found = logits.entropy()
        found.zero_()
        torch.testing.assert_close(logits.entropy(), entropy(want))
    assert logits.entropy().requires_grad
    banned = torch.arange(11) > 7
    with pytest.warns(UserWarning, match="masked_fill_"), torch.no_grad():
        logits.masked_fill_(banned, -1e9)
    torch.testing.assert_close(logits.entropy(), entropy(want.masked_fill(banned, -1e9)))


ODD = {
    "argmax, keepdim": lambda z: z.argmax(-1, keepdim=True),
    "argmax of tokens": lambda z: torch.argmax(z, dim=1),
    "mean, keepdim": lambda z: z.mean(-1, keepdim=True),
    "mean, dtype": lambda z: z.mean(-1, dtype=torch.float64),
    "mean of several": lambda z: z.mean((0, 1)),
    "log_softmax, dtype": lambda z: nn.functional.log_softmax(z, dim=-1, dtype=torch.float64).gather(
        -1, LABELS[..., None]
    ),
    "log_softmax of floats": lambda z: nn.functional.log_softmax(z, -1, dtype=torch.float32).gather(
        -1, LABELS[..., None]
    ),
    "log_softmax of tokens": lambda z: z.log_softmax(1),
    "rounded": lambda z: torch.div(z, 2, rounding_mode="floor"),
    "over zero": lambda z: z / 0.0,
    "over zero, in place": lambda z: z.div_(0.0) + 1.0,
    "times infinity": lambda z: z * float("inf"),
    "times zero": lambda z: (torch.tanh(z) * 0.0).log_softmax(-1).gather(-1, LABELS[..., None]),
    "negative and capped": lambda z: (torch.tanh(z) * -3.0).log_softmax(-1).gather(-1, LABELS[..., None]),
    "bits": lambda z: z.view(torch.int32),
    "real": lambda z: torch.real(z),
    "the real part": lambda z: z.real,
    "a copy": lambda z: z.to(torch.float64, copy=True),
    "by name": lambda z: z.flatten(start_dim=-3, end_dim=-2),
    "chunks by name": lambda z: torch.chunk(input=z, chunks=2, dim=1)[1],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_options_are_answered(name):
    found, want = _both(ODD[name])
    found = found.made() if isinstance(found, DeferredLogits) else found
    assert found.dtype == want.dtype and found.shape == want.shape
    torch.testing.assert_close(found, want, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*is not followed")
@pytest.mark.parametrize("call", [lambda z: z.chunk(2, dim=3), lambda z: z.split(1, dim=-4), lambda z: z.flatten(1, 0)])
def test_wrong_dimensions_are_refused_as_by_tensors(call):
    with pytest.raises((IndexError, RuntimeError), match="[dD]imension|dim"):
        call(put_off(HIDDEN))


def test_a_head_outside_of_the_autocast_around_it():
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with torch.autocast("cpu", enabled=False):
            logits, want = put_off(HIDDEN), LAYER(HIDDEN)
        found = logits.logp(LABELS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(found, _log_probs(want), rtol=1e-5, atol=1e-5)
