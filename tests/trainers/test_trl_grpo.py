"""GRPO and RLOO runs of TRL against the same on the fused path and in one pass."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
from trl import GRPOTrainer, RLOOTrainer

from fused_po.trainers.trl import FusedGRPOTrainer
from tests.trainers.trl_runs import assert_same, run

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
GRPO = {
    **{name: {"loss_type": name} for name in TYPES},
    **{f"{name}, sequence": {"loss_type": name, "importance_sampling_level": "sequence"} for name in TYPES},
    "beta": {"beta": 0.1},
    "beta, lora": {"beta": 0.1, "lora": True},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus, grpo": {"loss_type": "grpo", "entropy_coef": 0.05},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "clip": {"epsilon": 0.1, "epsilon_high": 0.2, "delta": 1.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.001},
    "accumulation": {"gradient_accumulation_steps": 2, "loss_type": "dapo"},
    "accumulation, grpo": {"gradient_accumulation_steps": 2, "loss_type": "grpo", "entropy_coef": 0.05},
    "lora": {"lora": True},
    # no bonus in the first step, whose entropy nobody knows yet, then one
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 10.0},
}


@pytest.mark.parametrize("case", GRPO)
def test_grpo(case, tmp_path):
    theirs = run("grpo", GRPOTrainer, tmp_path, **GRPO[case])
    assert_same(run("grpo", GRPOTrainer, tmp_path, enable=True, **GRPO[case]), theirs)
    assert_same(run("grpo", FusedGRPOTrainer, tmp_path, **GRPO[case]), theirs)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.1}], ids=["plain", "beta"])
def test_rloo(settings, tmp_path):
    theirs = run("rloo", RLOOTrainer, tmp_path, **settings)
    assert_same(run("rloo", RLOOTrainer, tmp_path, enable=True, **settings), theirs)
