"""Micro-batches that keep pairs together add up to the full batch, for every loss whose definition allows it."""

from __future__ import annotations

import re

import pytest
import torch

from fused_po import linear_loss, losses
from tests.losses.cases import CASES, create, side_inputs

H, V = 6, 11
ADDITIVE = [case for case in CASES if create(case).not_additive is None]
NORMALISERS = ("num_items", "num_sequences", "num_chosen_items")
# the first half chosen, the second rejected; 8 sequences for up to 4 micro-batches
LENGTHS = {"even": [4] * 8, "uneven": [1, 6, 3, 2, 5, 0, 4, 1]}


def problem(case: str, lengths: str, seed: int = 0):
    torch.manual_seed(seed)
    loss = create(case)
    count = len(LENGTHS[lengths])
    labels = torch.randint(0, V, (count, 7))
    for row, length in enumerate(LENGTHS[lengths]):
        labels[row, length:] = -100
    hidden, weight = torch.randn(count, 7, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    given = {name: torch.tensor(float((labels[:rows] >= 0).sum())) for name, rows in (("num_items", 8), ("n", 4))}
    normalisers = {"num_items": given["num_items"], "num_sequences": count, "num_chosen_items": given["n"]}
    return loss, hidden, weight, labels, side_inputs(loss, labels, logp), normalisers


def gradients(loss, hidden, weight, labels, inputs, rows, normalisers):
    """Value and gradients of some sequences; dH in the shape of all."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    mine = {name: value[rows] if value.ndim else value for name, value in inputs.items()}
    out = linear_loss(leaves[0][rows], leaves[1], labels[rows], loss, **mine, **normalisers)
    return (out.loss.detach(), *torch.autograd.grad(out.loss, leaves))


def accumulated(found, parts: int):
    """Summed over micro-batches of whole pairs."""
    loss, hidden, weight, labels, inputs, normalisers = found
    total = None
    for part in torch.arange(4).chunk(parts):
        rows = torch.cat([part, part + 4])
        got = gradients(loss, hidden, weight, labels, inputs, rows, normalisers)
        total = got if total is None else tuple(a + b for a, b in zip(total, got, strict=True))
    return total


@pytest.mark.pairwise
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("case", ADDITIVE)
def test_micro_batches_add_up(case, lengths, parts):
    found = problem(case, lengths)
    whole = gradients(*found[:5], torch.arange(8), {})
    for got, want in zip(accumulated(found, parts), whole, strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ADDITIVE])
def test_those_that_do_not_say_so(case):
    """None is on the list that does add up, and each docstring has the reason."""
    differ = []
    for seed in range(4):
        found = problem(case, "uneven", seed)
        # another order than the policy's
        found[4].update({name: value.flip(0) for name, value in found[4].items() if name == "ref_logp"})
        whole, summed = gradients(*found[:5], torch.arange(8), {})[1], accumulated(found, 4)[1]
        differ.append((summed - whole).norm() > 1e-6 * whole.norm())
    assert any(differ)
    docs = [" ".join(str(cls.__doc__).split()) for cls in type(found[0]).__mro__]
    assert any(re.search("do not add up to the full batch", doc) for doc in docs)


@pytest.mark.parametrize("case", ["sigmoid", "dapo", "grpo", "cpo", "ppo-all", "sft-paired"])
def test_a_missing_normaliser_shows(case):
    """The test above can fail: each micro-batch counts for itself without them."""
    found = problem(case, "uneven")
    whole = gradients(*found[:5], torch.arange(8), {})
    summed = accumulated((*found[:5], {}), 2)
    assert (summed[2] - whole[2]).norm() > 1e-3 * whole[2].norm()


@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_are_checked(name):
    loss, hidden, weight, labels, inputs, _ = problem("cpo", "even")
    for bad in (0, -1.0, float("nan"), float("inf"), torch.tensor(-1.0), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be above 0: got"):
            linear_loss(hidden, weight, labels, loss, **inputs, **{name: bad})
    with pytest.raises(ValueError, match=f"{name} must be a number: got '3'"):
        linear_loss(hidden, weight, labels, loss, **inputs, **{name: "3"})


def test_a_mixture_is_as_additive_as_its_parts():
    assert losses.create(["sigmoid", "sft"]).not_additive is None
    assert losses.create(["sigmoid", "aot"]).not_additive is not None
