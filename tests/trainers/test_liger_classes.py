"""Liger's classes and ours: the same arguments, loss, gradients and outputs."""

from __future__ import annotations

import inspect

import pytest
import torch

from fused_po.trainers import liger
from tests.oracles.problems import H, HeadProblem, V

chunked = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="Liger is not installed: its classes are not compared"
)

CASES = {
    "dpo": ("LigerFusedLinearDPOLoss", {"beta": 0.3}),
    "dpo, nll": ("LigerFusedLinearDPOLoss", {"beta": 0.3, "compute_nll_loss": True, "alpha": 0.4}),
    "dpo, no reference": ("LigerFusedLinearDPOLoss", {"use_ref_model": False}),
    "robust": ("LigerFusedLinearDPOLoss", {"loss_type": "robust", "label_smoothing": 0.2}),
    "apo_zero": ("LigerFusedLinearDPOLoss", {"loss_type": "apo_zero"}),
    "simpo": ("LigerFusedLinearSimPOLoss", {"beta": 2.0, "gamma": 0.7, "alpha": 0.4}),
    "simpo, no nll": ("LigerFusedLinearSimPOLoss", {"compute_nll_loss": False, "label_smoothing": 0.1}),
    "cpo": ("LigerFusedLinearCPOLoss", {"beta": 0.3, "alpha": 0.4}),
    "orpo": ("LigerFusedLinearORPOLoss", {"beta": 0.3}),
    "orpo, prompts": ("LigerFusedLinearORPOLoss", {"beta": 0.3}),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case, with_bias):
    name, settings = CASES[case]
    problem = HeadProblem(1)
    bias = torch.randn(V) * 0.1 if with_bias else None
    found = []
    for module in (chunked, liger):
        hidden, weight = problem.leaves()
        arguments = [weight, hidden, problem.labels, bias]
        if name == "LigerFusedLinearDPOLoss" and settings.get("use_ref_model", True):
            arguments += [problem.ref_hidden, problem.ref_weight]
        if case == "orpo, prompts":
            target = problem.labels.clone()
            target[:, 0] = torch.arange(target.shape[0])
            arguments.append(target)
        loss, outputs = getattr(module, name)(compiled=False, **settings)(*arguments)
        found.append((loss, outputs, torch.autograd.grad(loss, (hidden, weight))))
    (theirs, their_outputs, their_gradients), (ours, our_outputs, our_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert len(our_outputs) == len(their_outputs)
    for mine, want in zip(our_outputs, their_outputs, strict=True):
        torch.testing.assert_close(mine, torch.as_tensor(want), rtol=2e-5, atol=1e-6)
    for mine, want in zip(our_gradients, their_gradients, strict=True):
        assert (mine - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", liger.__all__)
def test_same_arguments(name):
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(getattr(m, name), method)).parameters for m in (liger, chunked))
        assert list(ours) == list(theirs)
        assert [one.default for one in ours.values()] == [one.default for one in theirs.values()]


def test_another_ignore_index():
    problem = HeadProblem(2)
    hidden, weight = problem.leaves()
    loss = liger.LigerFusedLinearCPOLoss(beta=0.3)(weight, hidden, problem.labels)[0]
    other = problem.labels.masked_fill(problem.labels < 0, V + 5)
    again = liger.LigerFusedLinearCPOLoss(beta=0.3, ignore_index=V + 5)(weight, hidden, other)[0]
    assert torch.equal(loss, again) and hidden.shape[-1] == H


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: liger.LigerFusedLinearDPOLoss(average_log_prob=True), "sigmoid_norm"),
        (lambda: liger.LigerFusedLinearCPOLoss(average_log_prob=True), "gamma=0"),
        (lambda: liger.LigerFusedLinearORPOLoss(compute_nll_loss=False), "odds ratio"),
        (lambda: liger.LigerFusedLinearDPOLoss(loss_type="unheard"), "unheard"),
        (lambda: liger.LigerFusedLinearDPOLoss(loss_type="aot", label_smoothing=0.1), "which Liger has: got 'aot'"),
        (lambda: liger.LigerFusedLinearDPOLoss(loss_type="conservative", label_smoothing=0.4), "which Liger has"),
    ],
)
def test_what_is_not_here_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_reference_is_refused():
    problem = HeadProblem(0)
    with pytest.raises(ValueError, match="needs ref_input and ref_weight"):
        liger.LigerFusedLinearDPOLoss()(problem.weight, problem.hidden, problem.labels)


def test_an_nll_over_fewer_tokens_than_the_answers_is_refused():
    weight, hidden = torch.randn(11, 8), torch.randn(2, 4, 8)
    target = torch.randint(11, (2, 4))
    nll_target = target.clone()
    nll_target[0, 2] = -100
    with pytest.raises(ValueError, match="nll_target must have the labels of target"):
        liger.LigerFusedLinearORPOLoss()(weight, hidden, target, nll_target=nll_target)
    # the rejected half has no NLL
    nll_target = target.clone()
    nll_target[1] = -100
    loss, _ = liger.LigerFusedLinearORPOLoss()(weight, hidden, target, nll_target=nll_target)
    same, _ = liger.LigerFusedLinearORPOLoss()(weight, hidden, target)
    torch.testing.assert_close(loss, same)


@pytest.mark.parametrize("certain", ["both", "chosen", "rejected"])
def test_orpo_of_answers_that_are_certain(certain):
    """log(1 - P) of an answer with P = 1 to rounding."""
    hidden = torch.zeros(2, 3, 2)
    hidden[:, :, 1] = torch.tensor([200.0 if certain in ("both", side) else 1.0 for side in ("chosen", "rejected")])[
        :, None
    ]
    weight = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]])
    target = torch.zeros(2, 3, dtype=torch.int64)
    loss, outputs = liger.LigerFusedLinearORPOLoss(beta=0.1)(weight, hidden, target)
    ratio, chosen = outputs[-2:]
    assert loss.isfinite() and ratio.isfinite() and chosen.isfinite()
    if certain == "both":
        assert ratio.item() == pytest.approx(-0.6931, abs=1e-4) and chosen.item() == 0.0
    else:
        assert chosen.item() == pytest.approx(86.0 if certain == "chosen" else -86.0, abs=3.0)
