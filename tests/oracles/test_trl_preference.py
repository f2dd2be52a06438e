"""DPO and KTO losses and metrics against the installed TRL's own trainer code."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fused_po import losses
from tests.oracles.trl_trainers import LENGTHS, Accelerator, Model, Problem, check

pytest.importorskip("trl", reason="TRL is not installed: its losses are not compared")
from trl import DPOTrainer, KTOTrainer


def dpo(problem: Problem, loss_types: list[str], **settings):
    leaves = problem.leaves()

    def outputs(**tensors) -> SimpleNamespace:
        return SimpleNamespace(
            entropy=problem.entropy,
            mean_logits=problem.mean_logit,
            is_top1=problem.is_top1,
            log_sum_sq_probs=problem.log_sum_sq_probs,
            **tensors,
        )

    def model(**_):
        return outputs(log_probs=leaves["log_probs"])

    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        model=Model(),
        ref_model=lambda **_: outputs(log_probs=problem.ref_logp),
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau", 0.05)),
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
        loss_types=loss_types,
        **{
            "aux_loss_enabled": False,
            "precompute_ref_logps": False,
            "ld_alpha": None,
            "beta": 0.1,
            "label_smoothing": 0.0,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "use_weighting": False,
            "loss_weights": [1.0] * len(loss_types),
            **settings,
        },
    )
    inputs = {
        "input_ids": problem.input_ids,
        "attention_mask": problem.attention_mask,
        "completion_mask": problem.completion_mask,
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False), leaves, metrics


MARGIN_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
DPO_LOSSES = (
    *MARGIN_LOSSES,
    *("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
)
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def check_dpo(problem: Problem, name: str | list[str], beta: float = 0.3, **settings) -> None:
    value, leaves, metrics = dpo(problem, [name] if isinstance(name, str) else name, beta=beta, **settings)
    loss = losses.create(name, beta=beta, **settings)
    needed = {"ref_logp": problem.ref_logp} if "ref_logp" in loss.needs else {}
    check(problem.ours(loss, **needed), value, leaves, metrics)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_dpo_types(name, seed):
    settings = {"label_smoothing": 0.15} if name in SMOOTHED else {}
    check_dpo(Problem(seed), name, **settings)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_dpo_divergences(name, divergence):
    settings = {"label_smoothing": 0.15} if name in SMOOTHED else {}
    check_dpo(Problem(3, 0.3), name, f_divergence_type=divergence, f_alpha_divergence_coef=0.7, **settings)


# TRL multiplies the output of relu in place, which autograd refuses
@pytest.mark.parametrize("name", [name for name in DPO_LOSSES if "aot" not in name and name != "hinge"])
def test_dpo_weighting(name):
    check_dpo(Problem(4), name, use_weighting=True, **({"label_smoothing": 0.15} if name in SMOOTHED else {}))


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_dpo_length_desensitised(name):
    check_dpo(Problem(5), name, ld_alpha=0.4, **({"label_smoothing": 0.15} if name in SMOOTHED else {}))


@pytest.mark.parametrize("tau", [0.05, 1.5])
def test_dpo_discopop_temperature(tau):
    check_dpo(Problem(6), "discopop", discopop_tau=tau)


@pytest.mark.parametrize("weighted", [False, True])
def test_dpo_mixtures(weighted):
    # with weighting TRL fails on sft
    names, weights = ["sigmoid", "bco_pair", "ipo" if weighted else "sft"], [0.8, 0.2, 1.0]
    check_dpo(Problem(7), names, loss_weights=weights, use_weighting=weighted)


def test_dpo_weighted_hinge():
    """TRL's value, without its gradient."""
    problem = Problem(4)
    with torch.no_grad():
        want, _, _ = dpo(problem, ["hinge"], use_weighting=True)
    ours, *_ = problem.ours(losses.create("hinge", use_weighting=True), ref_logp=problem.ref_logp)
    torch.testing.assert_close(ours.float(), want, rtol=1e-6, atol=1e-6)


def test_dpo_sft():
    """Alone it reads no reference, so the metrics of a reference are not there."""
    problem = Problem(8)
    value, leaves, metrics = dpo(problem, ["sft"])
    logged = {name: metrics[name] for name in ("entropy", "mean_token_accuracy")}
    check(problem.ours(losses.create("sft", paired=True)), value, leaves, logged)


@pytest.mark.parametrize("name", ["discopop", "sigmoid", "hinge", "apo_zero", "exo_pair"])
@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_dpo_far_margins(name, shift):
    """Equal wherever TRL is finite."""
    problem = Problem(9)
    problem.logp[:4] += problem.zeroed(torch.full_like(problem.logp, shift))[:4]
    settings = {"label_smoothing": 0.15} if name in SMOOTHED else {}
    value, _, _ = dpo(problem, [name], beta=0.3, **settings)
    loss = losses.create(name, beta=0.3, **settings)
    ours, gradients, *_ = problem.ours(loss, ref_logp=problem.ref_logp)
    assert ours.isfinite() and gradients[0].isfinite().all()
    if value.isfinite():
        torch.testing.assert_close(ours.float(), value.detach(), rtol=1e-5, atol=1e-6)
    else:
        assert name == "discopop" and shift < 0


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("seed", range(3))
def test_kto_types(name, seed):
    problem = Problem(seed)
    leaves = problem.leaves()
    kl_logps, ref_kl_logps = torch.randn(len(LENGTHS)) + 0.4, torch.randn(len(LENGTHS))
    calls = iter([kl_logps, ref_kl_logps])

    def model(**_):
        return SimpleNamespace(
            log_probs=leaves["log_probs"], entropy=problem.entropy, mean_logits=problem.mean_logit, aux_loss=None
        )

    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        model=Model(),
        ref_model=lambda **_: SimpleNamespace(log_probs=problem.ref_logp),
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda *_: next(calls),
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_type=name,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    )
    inputs = {
        "input_ids": problem.input_ids,
        "attention_mask": problem.attention_mask,
        "completion_mask": problem.completion_mask,
        "label": problem.desirable,
    }
    value = KTOTrainer._compute_loss(trainer, model, inputs, False)
    loss = losses.create(name, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    side = {"ref_logp": problem.ref_logp, "desirable": problem.desirable}
    if name == "kto":
        side["kl"] = (kl_logps - ref_kl_logps).mean().clamp(min=0)
    ignored = () if name == "kto" else ("kl",)  # TRL logs a constant 0
    check(problem.ours(loss, **side), value, leaves, metrics, ignored)
