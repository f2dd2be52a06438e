"""Liger's KTO and GRPO classes and ours: the same loss, gradients and outputs."""

from __future__ import annotations

import pytest
import torch

from fused_po.trainers import liger
from tests.oracles.problems import LENGTHS, HeadProblem, V

chunked = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="Liger is not installed: its classes are not compared"
)

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
CASES = {
    **{name: {"loss_type": name, "beta": 0.0} for name in TYPES},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.0, "max_completion_length": 20},
    "cispo": {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.1},
    "sapo, temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.6},
    "vespo, weights": {"loss_type": "vespo", "beta": 0.0, "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.1},
    "defaults": {},
    "kl, times the ratio": {"beta": 0.1, "use_bias_correction_kl": True},
    "asymmetric": {"beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 0.28},
    "two-sided": {"beta": 0.0, "delta": 1.4},
    "temperature": {"loss_type": "grpo", "temperature": 0.7},
    "sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1, "epsilon_low": 0.05},
    "luspo, sequences": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0},
    "no reference": {"use_ref_model": False},
}


class Pair:
    """One call of Liger's class and of ours on the same problem."""

    def __init__(self, name, settings, arguments):
        self.results = []
        for module in (chunked, liger):
            problem = HeadProblem(1)
            leaves = [*problem.leaves(), (torch.randn(V) * 0.1).requires_grad_()]
            loss, outputs = getattr(module, name)(compiled=False, **settings)(*leaves[:2], **arguments(problem, leaves))
            self.results.append((loss, outputs, torch.autograd.grad(loss, leaves, allow_unused=True)))

    def check(self):
        (want, wanted_outputs, gradients), (loss, outputs, found) = self.results
        torch.testing.assert_close(loss, want, rtol=2e-6, atol=2e-7)
        assert len(outputs) == len(wanted_outputs)
        for mine, theirs in zip(outputs, wanted_outputs, strict=True):
            torch.testing.assert_close(mine, torch.as_tensor(theirs), rtol=2e-5, atol=1e-6)
        for mine, theirs in zip(found, gradients, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine - theirs).norm() <= 1e-5 * theirs.norm()
        assert found[0].norm() > 0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kl", [None, 0.4])
@pytest.mark.parametrize("reference", [False, True])
def test_kto(reference, kl, with_bias):
    def arguments(problem, leaves):
        given = {"target": problem.labels, "preference_labels": problem.desirable}
        if reference:
            given |= {"ref_input": problem.ref_hidden, "ref_weight": problem.ref_weight}
        given |= {"bias": leaves[2]} if with_bias else {}
        return given | ({} if kl is None else {"kl": torch.tensor(kl)})

    pair = Pair("LigerFusedLinearKTOLoss", {"beta": 0.3, "use_ref_model": reference}, arguments)
    pair.check()
    assert len(pair.results[1][1]) == 6


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_grpo(case, first_step):
    def arguments(problem, leaves):
        given = {
            "selected_token_ids": problem.labels.clamp_min(0),
            "attention_mask": problem.keep.long(),
            "advantages": problem.advantage,
        }
        given |= {} if first_step else {"old_per_token_logps": problem.old_logp}
        return given | {"ref_per_token_logps": problem.ref_logp}

    Pair("LigerFusedLinearGRPOLoss", CASES[case], arguments).check()


@pytest.mark.parametrize("weights", ["sequences", "columns", "tokens"])
@pytest.mark.parametrize("name", ["dapo", "vespo"])
def test_grpo_with_all_that_can_be_given(name, weights):
    def arguments(problem, leaves):
        per_sequence = problem.importance[:, 1]
        ratio = {"sequences": per_sequence, "columns": per_sequence[:, None], "tokens": problem.importance}
        return {
            "selected_token_ids": problem.labels.clamp_min(0),
            "attention_mask": problem.keep.long(),
            "advantages": problem.advantage,
            "bias": leaves[2],
            "old_per_token_logps": problem.old_logp,
            "ref_input": problem.ref_hidden,
            "ref_weight": problem.ref_weight,
            "ref_bias": torch.linspace(-1, 1, V),
            "vllm_is_ratio": ratio[weights],
            "num_items_in_batch": torch.tensor(50),
        }

    pair = Pair("LigerFusedLinearGRPOLoss", {"loss_type": name, "beta": 0.1, "temperature": 1.3}, arguments)
    pair.check()
    assert all(gradient is not None for gradient in pair.results[1][2])


def test_num_items_as_a_number_and_as_a_tensor():
    problem = HeadProblem(1)
    hidden, weight = problem.leaves()
    given = [hidden, weight, problem.labels.clamp_min(0), problem.keep, problem.advantage]
    module = liger.LigerFusedLinearGRPOLoss(use_ref_model=False)
    counted = module(*given)[0]
    assert torch.equal(module(*given, num_items_in_batch=sum(LENGTHS))[0], counted)
    twice = module(*given, num_items_in_batch=torch.tensor(2 * sum(LENGTHS)))[0]
    torch.testing.assert_close(2 * twice, counted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_num_items_are_those_of_all_ranks(kind, monkeypatch):
    """DDP takes the mean over ranks, so each divides by its share."""
    problem = HeadProblem(1)
    hidden, weight = problem.leaves()
    given = [hidden, weight, problem.labels.clamp_min(0), problem.keep, problem.advantage]
    module = liger.LigerFusedLinearGRPOLoss(use_ref_model=False)
    alone = module(*given, num_items_in_batch=kind(10))[0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    assert torch.equal(module(*given, num_items_in_batch=kind(20))[0], alone)


def test_luspo_sums_loss_tokens_alone():
    """By its formula in float64, whatever stands at masked positions."""
    problem = HeadProblem(1)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in problem.leaves())
    module = liger.LigerFusedLinearGRPOLoss(loss_type="luspo", beta=0.0, use_ref_model=False)
    other = problem.labels.masked_fill(~problem.keep, 3)
    old = problem.old_logp.double().masked_fill(~problem.keep, 7.0)
    loss = module(hidden, weight, other, problem.keep, problem.advantage.double(), old_per_token_logps=old)[0]
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, other[..., None])[..., 0]
    ratio, advantage = (logp - old).exp(), problem.advantage.double()[:, None]
    terms = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    truth = torch.where(problem.keep, terms, 0.0).sum() / len(LENGTHS)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    for mine, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: liger.LigerFusedLinearKTOLoss(average_log_prob=True), "sum of log-ratios"),
        (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="unheard"), "grpo, bnpo, .*: got 'unheard'"),
        (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="dr_grpo"), "needs max_completion_length"),
        (lambda: liger.LigerFusedLinearGRPOLoss(delta=-1.0), "delta must lie"),
        (
            lambda: liger.LigerFusedLinearGRPOLoss(loss_type="sapo", importance_sampling_level="sequence"),
            "sapo has ratios per token",
        ),
    ],
)
def test_what_is_not_here_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_missing_is_said():
    problem = HeadProblem(0)
    hidden, weight = problem.leaves()
    with pytest.raises(ValueError, match="preference_labels are needed"):
        liger.LigerFusedLinearKTOLoss()(hidden, weight, problem.labels)
    with pytest.raises(ValueError, match="needs ref_input and ref_weight"):
        kto = liger.LigerFusedLinearKTOLoss(use_ref_model=True)
        kto(hidden, weight, problem.labels, preference_labels=problem.desirable)
    tokens = problem.labels.clamp_min(0), problem.keep, problem.advantage
    for beta in (0.0, 0.1):
        with pytest.raises(ValueError, match="needs ref_per_token_logps, or ref_input and ref_weight"):
            liger.LigerFusedLinearGRPOLoss(beta=beta)(hidden, weight, *tokens)
