"""GRPO, GMPO and RLOO losses and metrics against the installed TRL's own trainer code."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_po import losses
from fused_po.losses.batch import SIDE_INPUTS
from tests.oracles.trl_trainers import PROMPT, Accelerator, Model, Problem, check

pytest.importorskip("trl", reason="TRL is not installed: its losses are not compared")
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

from fused_po.trainers.trl.grpo import with_entropy_of_the_call

GRPO_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
# settings beside the loss type, and side inputs beyond advantages and old log-probs
GRPO_SETTINGS = {
    "plain": {},
    "first step": {"old": False},
    "one-sided": {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.3},
    "low delta": {"delta": 1.1, "epsilon_high": 0.28},
    "kl": {"beta": 0.1},
    "kl, plain": {"beta": 0.1, "use_bias_correction_kl": False},
    "entropy": {"entropy_coef": 0.05},
    "top entropy": {"top_entropy_quantile": 0.3},
    "top entropy, bonus, kl": {"top_entropy_quantile": 0.3, "entropy_coef": 0.05, "beta": 0.1},
    "off-policy": {"off_policy_mask_threshold": 0.0},
    "off-policy, sampler": {"off_policy_mask_threshold": 0.0, "sampling": True},
    "importance": {"importance": True, "beta": 0.1},
    "advantages per token": {"per_token": True},
}


def grpo_trainer(problem: Problem, loss_type: str, leaves: dict[str, Tensor], **settings) -> SimpleNamespace:
    logps, entropies = problem.completions(leaves["log_probs"]), problem.completions(leaves["entropy"])
    epsilon = settings.pop("epsilon", 0.2)
    high = settings.pop("epsilon_high", None)
    entropy_coef = settings.pop("entropy_coef", 0.0)
    arguments = SimpleNamespace(
        use_bias_correction_kl=settings.pop("use_bias_correction_kl", True),
        delta=settings.pop("delta", None),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        steps_per_generation=1,
    )
    trainer = SimpleNamespace(
        model=Model(),
        accelerator=Accelerator(),
        args=arguments,
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon if high is None else high,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=entropy_coef != 0.0,
        use_adaptive_entropy=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=20,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        **{
            "beta": 0.0,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            **settings,
        },
    )
    trainer.get_high_entropy_mask = lambda *a, **k: GRPOTrainer.get_high_entropy_mask(trainer, *a, **k)
    return trainer


def grpo(problem: Problem, name: str, settings: dict[str, object]):
    """TRL's value, leaves and metrics, and our loss's side inputs."""
    settings = dict(settings)
    options = {key: settings.pop(key, default) for key, default in
               (("old", True), ("sampling", False), ("importance", False), ("per_token", False))}  # fmt: skip
    leaves = problem.leaves()
    trainer = grpo_trainer(problem, name, leaves, **settings)
    mask = problem.completions(problem.keep).long()
    advantages = torch.randn(problem.labels.shape) if options["per_token"] else problem.advantages
    importance = torch.where(problem.keep, torch.rand(problem.labels.shape) + 0.5, 1.0)
    if not options["importance"]:
        importance = torch.ones_like(importance)
    side = {"advantage": advantages, "old_logp": problem.old_logp, "ref_logp": problem.ref_logp}
    side["importance_weight"], side["sampling_logp"] = importance, problem.sampling_logp
    inputs = {
        "prompt_ids": problem.input_ids[:, :PROMPT],
        "prompt_mask": problem.attention_mask[:, :PROMPT],
        "completion_ids": problem.input_ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": problem.completions(advantages) if options["per_token"] else advantages,
        "old_per_token_logps": problem.completions(problem.old_logp),
        "ref_per_token_logps": problem.completions(problem.ref_logp),
        "sampling_per_token_logps": problem.completions(problem.sampling_logp),
        "importance_sampling_ratio": problem.completions(importance),
        "num_items_in_batch": torch.tensor(31.0),
    }
    if not options["old"]:
        del side["old_logp"], inputs["old_per_token_logps"]
    if not options["sampling"]:
        del side["sampling_logp"], inputs["sampling_per_token_logps"]
    if not options["importance"]:
        del side["importance_weight"]
    return trainer, inputs, leaves, side


def capped(name: str, settings: dict[str, object]) -> dict[str, object]:
    """CISPO's ``epsilon_high`` caps the ratio itself, which is near 1."""
    if name != "cispo":
        return dict(settings)
    return {**settings, "epsilon_high": 1.05 if "epsilon_high" in settings else 1.1}


def check_grpo(problem: Problem, name: str, settings: dict[str, object]) -> None:
    settings = capped(name, settings)
    trainer, inputs, leaves, side = grpo(problem, name, settings)
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = {key: v for key, v in settings.items() if key not in ("old", "sampling", "importance", "per_token")}
    if name == "dr_grpo":
        ours["max_completion_length"] = 20
    # with num_items our entropy bonus is a mean over these, so that micro-batches add up; TRL's is one over the call
    loss = with_entropy_of_the_call(losses.create(name, **ours))
    side = {key: tensor for key, tensor in side.items() if key in loss.needs & SIDE_INPUTS}
    check(problem.ours(loss, num_items=31, **side), value, leaves, trainer._metrics["train"])


# settings that a loss type does not read, so that they change nothing
UNREAD = {"one-sided": {"sapo", "vespo"}, "low delta": {"sapo", "vespo"}}


@pytest.mark.parametrize("settings", [name for name in GRPO_SETTINGS if name != "plain"])
@pytest.mark.parametrize("name", GRPO_TYPES)
def test_every_setting_matters(name, settings):
    """The data lie on both sides of each threshold: a setting gives another gradient than none does."""
    found = []
    for chosen in ("plain", settings):
        options = capped(name, GRPO_SETTINGS[chosen])
        problem = Problem(1)
        _, _, _, side = grpo(problem, name, options)
        ours = {key: v for key, v in options.items() if key not in ("old", "sampling", "importance", "per_token")}
        loss = losses.create(name, **ours)
        side = {key: tensor for key, tensor in side.items() if key in loss.needs & SIDE_INPUTS}
        found.append(problem.ours(loss, num_items=31, **side)[1])
    (c, e), (other_c, other_e) = found
    same = torch.equal(c, other_c) and (e is None) == (other_e is None)
    assert same == (name in UNREAD.get(settings, ()))


@pytest.mark.parametrize("settings", GRPO_SETTINGS)
@pytest.mark.parametrize("name", GRPO_TYPES)
def test_grpo_types(name, settings):
    check_grpo(Problem(1), name, GRPO_SETTINGS[settings])


@pytest.mark.parametrize(
    "settings",
    [
        *("plain", "first step", "one-sided", "kl", "entropy", "top entropy", "off-policy", "importance"),
        "advantages per token",
    ],
)
@pytest.mark.parametrize("name", [name for name in GRPO_TYPES if name != "vespo"])
def test_grpo_at_sequence_level(name, settings):
    check_grpo(Problem(2), name, {**GRPO_SETTINGS[settings], "importance_sampling_level": "sequence"})


def test_gspo_is_sequence_level_grpo():
    problem = Problem(3, 0.01)
    settings = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    trainer, inputs, leaves, side = grpo(problem, "grpo", settings)
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    found = problem.ours(losses.create("gspo"), advantage=side["advantage"], old_logp=side["old_logp"])
    check(found, value, leaves, trainer._metrics["train"])


@pytest.mark.parametrize("settings", ["plain", "one-sided", "kl, plain", "top entropy"])
def test_gmpo(settings):
    problem = Problem(4)
    chosen = {key: v for key, v in GRPO_SETTINGS[settings].items() if key != "delta"}
    trainer, inputs, leaves, side = grpo(problem, "grpo", {"epsilon": 0.4, **chosen})
    value = GMPOTrainer._compute_loss(trainer, None, inputs)
    loss = losses.create("gmpo", **{key: v for key, v in chosen.items() if key != "use_bias_correction_kl"})
    side = {key: side[key] for key in ("advantage", "old_logp", "ref_logp") if key in loss.needs}
    check(problem.ours(loss, **side), value, leaves, trainer._metrics["train"])


@pytest.mark.parametrize("seed", range(3))
def test_rloo(seed):
    problem = Problem(seed, 0.3)
    trainer, inputs, leaves, side = grpo(problem, "rloo", {"epsilon": 0.1, "epsilon_high": 0.15})
    inputs["old_logps"] = problem.old_logp.sum(1)
    value = RLOOTrainer._compute_loss(trainer, None, inputs)
    loss = losses.create("rloo", epsilon=0.1, epsilon_high=0.15)
    found = problem.ours(loss, advantage=side["advantage"], old_logp=inputs["old_logps"])
    check(found, value, leaves, trainer._metrics["train"])


def test_the_clipped_share_is_measured():
    """The metrics compared above are not all 0 or 1."""
    problem = Problem(1)
    _, _, metrics, _ = problem.ours(losses.create("dapo"), advantage=problem.advantages, old_logp=problem.old_logp)
    assert all(0 < metrics[f"clip_ratio/{name}_mean"] < 1 for name in ("low", "high", "region"))
    assert math.isfinite(metrics["clip_ratio/high_max"])
