"""DPO and KTO runs of TRL against the same on the fused path and in one pass."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from fused_po.trainers.trl import FusedDPOTrainer, FusedKTOTrainer
from tests.trainers.trl_runs import assert_same, run, tiny

SMOOTHED = {"label_smoothing": 0.1}
DPO = {
    "sigmoid": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], **SMOOTHED},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], **SMOOTHED},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"], **SMOOTHED},
    "aot_unpaired": {"loss_type": ["aot_unpaired"], **SMOOTHED},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    # its modulation multiplies float32 rounding by 1 / tau = 20, and each step by that again
    "discopop": {"loss_type": ["discopop"], "learning_rate": 0.01},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "a list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "WPO": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.4},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "tied": {"model": lambda: tiny(tie_word_embeddings=True)},
}


@pytest.mark.parametrize("case", DPO)
def test_dpo(case, tmp_path):
    theirs = run("dpo", DPOTrainer, tmp_path, **DPO[case])
    assert_same(run("dpo", DPOTrainer, tmp_path, enable=True, **DPO[case]), theirs)
    assert_same(run("dpo", FusedDPOTrainer, tmp_path, **DPO[case]), theirs)


KTO = {
    "kto": {},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "weights": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("case", KTO)
def test_kto(case, tmp_path):
    theirs = run("kto", KTOTrainer, tmp_path, **KTO[case])
    assert_same(run("kto", KTOTrainer, tmp_path, enable=True, **KTO[case]), theirs)
    assert_same(run("kto", FusedKTOTrainer, tmp_path, **KTO[case]), theirs)


def test_sft(tmp_path):
    theirs = run("sft", SFTTrainer, tmp_path)
    assert_same(run("sft", SFTTrainer, tmp_path, enable=True), theirs)
