"""Losses and gradients against Liger's chunked losses, from hidden states; but for ``luspo``, where Liger errs."""

from __future__ import annotations

import pytest
import torch

from fused_po import losses
from tests.oracles.problems import HeadProblem

chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed: its losses are not compared")

SMOOTHED = ("robust", "exo_pair")
DPO_TYPES = ("sigmoid", "hinge", *SMOOTHED, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DPO_TYPES)
def test_dpo(name, seed):
    problem = HeadProblem(seed)
    smoothing = {"label_smoothing": 0.15} if name in SMOOTHED else {}
    theirs = chunked.LigerFusedLinearDPOLoss(compiled=False, beta=0.3, loss_type=name, **smoothing)
    hidden, weight = problem.leaves()
    value = theirs(weight, hidden, problem.labels, ref_input=problem.ref_hidden, ref_weight=problem.ref_weight)[0]
    loss = losses.create(name, beta=0.3, **smoothing)
    amplified = (name, seed) == ("discopop", 2)
    problem.check(loss, value, (hidden, weight), amplified=amplified, ref_logp=problem.ref_logp)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("nll", [False, True])
def test_simpo(nll, smoothing):
    problem = HeadProblem()
    theirs = chunked.LigerFusedLinearSimPOLoss(
        compiled=False, beta=2.0, gamma=0.7, alpha=0.4, label_smoothing=smoothing, compute_nll_loss=nll
    )
    hidden, weight = problem.leaves()
    value = theirs(weight, hidden, problem.labels)[0]
    # Liger's alpha weighs the NLL
    ours = losses.create("simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.4 if nll else 0.0, label_smoothing=smoothing)
    problem.check(ours, value, (hidden, weight))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("nll", [False, True])
def test_cpo(nll, smoothing):
    problem = HeadProblem()
    theirs = chunked.LigerFusedLinearCPOLoss(
        compiled=False, beta=0.3, alpha=0.4, label_smoothing=smoothing, compute_nll_loss=nll
    )
    hidden, weight = problem.leaves()
    value = theirs(weight, hidden, problem.labels)[0]
    ours = losses.create("cpo", beta=0.3, cpo_alpha=0.4 if nll else 0.0, label_smoothing=smoothing)
    problem.check(ours, value, (hidden, weight))


def test_orpo():
    problem = HeadProblem()
    hidden, weight = problem.leaves()
    value = chunked.LigerFusedLinearORPOLoss(compiled=False, beta=0.3)(weight, hidden, problem.labels)[0]
    problem.check(losses.create("orpo", beta=0.3), value, (hidden, weight))


@pytest.mark.parametrize("kl", [0.0, 0.4])
def test_kto(kl):
    problem = HeadProblem()
    theirs = chunked.LigerFusedLinearKTOLoss(compiled=False, beta=0.3, use_ref_model=True)
    hidden, weight = problem.leaves()
    value = theirs(
        hidden,
        weight,
        problem.labels,
        preference_labels=problem.desirable,
        ref_input=problem.ref_hidden,
        ref_weight=problem.ref_weight,
        kl=torch.tensor(kl),
    )[0]
    given = {"ref_logp": problem.ref_logp, "desirable": problem.desirable, "kl": torch.tensor(kl)}
    problem.check(losses.create("kto", beta=0.3), value, (hidden, weight), **given)


TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
SETTINGS = {
    "plain": {},
    "first step": {"old": False},
    "two-sided": {"delta": 1.25, "epsilon_high": 0.28},
    "kl": {"beta": 0.1, "use_bias_correction_kl": True},
    "kl, plain": {"beta": 0.1},
    "importance": {"beta": 0.1, "importance": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("name", "level"),
    [*((name, "token") for name in TYPES), *((name, "sequence") for name in ("grpo", "bnpo", "dr_grpo", "dapo"))],
)
def test_grpo(name, level, settings):
    problem = HeadProblem()
    # of CISPO it caps the ratio itself
    options = {"beta": 0.0, "epsilon_high": 1.1 if name == "cispo" else 0.2, **SETTINGS[settings]}
    if name == "cispo" and settings == "two-sided":
        options["epsilon_high"] = 1.05
    old, importance = options.pop("old", True), options.pop("importance", False)
    options["use_bias_correction_kl"] = options.get("use_bias_correction_kl", False)
    lengths = {"max_completion_length": 20} if name == "dr_grpo" else {}
    theirs = chunked.LigerFusedLinearGRPOLoss(
        compiled=False,
        use_ref_model=True,
        epsilon_low=0.2,
        loss_type=name,
        importance_sampling_level=level,
        max_completion_length=20,
        **options,
    )
    hidden, weight = problem.leaves()
    value = theirs(
        hidden,
        weight,
        problem.labels.clamp_min(0),
        problem.keep.long(),
        problem.advantage,
        ref_per_token_logps=problem.ref_logp,
        old_per_token_logps=problem.old_logp if old else None,
        vllm_is_ratio=problem.importance if importance else None,
    )[0]
    loss = losses.create(name, importance_sampling_level=level, **options, **lengths)
    given = {"advantage": problem.advantage}
    given |= {"old_logp": problem.old_logp} if old else {}
    given |= {"ref_logp": problem.ref_logp} if options["beta"] else {}
    given |= {"importance_weight": problem.importance} if importance else {}
    # the ratio of a whole sequence, squared; at the first step it is 1, importance weights change its rounding
    amplified = name == "vespo" and settings not in ("first step", "importance")
    problem.check(loss, value, (hidden, weight), amplified=amplified, **given)
