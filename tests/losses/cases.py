"""One table of losses with hyper-parameters, and batches with every side input a loss may read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fused_po import losses
from fused_po.losses.batch import SIDE_INPUTS, Batch
from fused_po.ops.batches import Layout, call_batch, chunk_batch
from fused_po.ops.planning import cut, make_plan, static_plan
from fused_po.stats import Stats

# every registered loss appears (checked), with the hyper-parameters that switch terms on
CASES: dict[str, tuple[str | list[str], dict[str, object]]] = {
    "alphapo": ("alphapo", {"beta": 2.0, "alpha": 0.25, "simpo_gamma": 0.3}),
    "aot": ("aot", {"label_smoothing": 0.1}),
    "aot-ld": ("aot", {"ld_alpha": 0.5}),
    "aot_unpaired": ("aot_unpaired", {}),
    "apo_down": ("apo_down", {"beta": 0.4}),
    "apo_zero": ("apo_zero", {"beta": 0.4}),
    "apo_zero_unpaired": ("apo_zero_unpaired", {"beta": 0.4, "undesirable_weight": 0.7}),
    "aspo": ("aspo", {"epsilon": 0.3, "dual_clip": 1.2}),
    "asymre": ("asymre", {}),
    "bco": ("bco", {"beta": 0.4, "desirable_weight": 1.3}),
    "bco-batch": ("bco", {"beta": 0.4, "shift_weight": 0.7}),
    "bco_pair": ("bco_pair", {}),
    "bco_pair-batch": ("bco_pair", {"shift_weight": 0.7}),
    "beta_dpo": ("beta_dpo", {"kept": 0.6, "use_weighting": True}),
    "bnpo": ("bnpo", {"beta": 0.05, "entropy_coef": 0.01}),
    "cal_dpo": ("cal_dpo", {"beta": 0.4}),
    "cispo": ("cispo", {"epsilon_high": 1.1, "beta": 0.05}),
    "cispo-sequence": ("cispo", {"epsilon_high": 1.1, "importance_sampling_level": "sequence"}),
    "cispo_verl": ("cispo_verl", {"loss_agg_mode": "seq-mean-token-mean"}),
    "clip_cov": ("clip_cov", {"clip_cov_ratio": 0.2, "clip_cov_lb": -0.5, "clip_cov_ub": 0.5, "seed": 3}),
    "conservative": ("conservative", {"label_smoothing": 0.2}),
    "cpo": ("cpo", {"label_smoothing": 0.1}),
    "cpo-hinge": ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}),
    "cpo-ipo": ("cpo", {"loss_type": "ipo", "beta": 0.4}),
    "dapo": ("dapo", {}),
    "dapo-all": ("dapo", {"epsilon_high": 0.28, "beta": 0.05, "entropy_coef": 0.01, "delta": 1.5}),
    "dapo-masks": ("dapo", {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "off_policy_mask_threshold": -0.1}),
    "dapo-plain-kl": ("dapo", {"beta": 0.05, "use_bias_correction_kl": False, "kl_estimator": "k1"}),
    "discopop": ("discopop", {"beta": 0.4, "discopop_tau": 0.5}),
    "dpop": ("dpop", {"dpop_lambda": 5.0}),
    "dr_grpo": ("dr_grpo", {"max_completion_length": 20, "beta": 0.05, "kl_estimator": "k2"}),
    "exo_pair": ("exo_pair", {"label_smoothing": 0.1}),
    "gmpo": ("gmpo", {"epsilon": 0.2, "beta": 0.05}),
    "gmpo-entropy": ("gmpo", {"epsilon": 0.2, "top_entropy_quantile": 0.5}),
    "gpg": ("gpg", {}),
    "gpg-off-policy": ("gpg", {"off_policy_mask_threshold": 0.0}),
    "grpo": ("grpo", {"beta": 0.05}),
    "grpo-sequence": ("grpo", {"importance_sampling_level": "sequence", "beta": 0.05, "delta": 1.02, "epsilon": 0.05}),
    "gspo": ("gspo", {"epsilon": 0.03, "epsilon_high": 0.05}),
    "gspo_token": ("gspo_token", {"epsilon": 0.03, "epsilon_high": 0.05, "beta": 0.05}),
    "hinge": ("hinge", {"beta": 0.3}),
    "ipo": ("ipo", {"beta": 0.4}),
    "ipo-js": ("ipo", {"beta": 0.4, "f_divergence_type": "js_divergence"}),
    "kl_cov": ("kl_cov", {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.5}),
    "kto": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    "luspo": ("luspo", {"importance_sampling_level": "sequence"}),
    "mixture": (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0], "beta": 0.2}),
    "mixture-weighted": (["hinge", "apo_zero"], {"use_weighting": True}),
    "nca_pair": ("nca_pair", {"beta": 0.4}),
    "nsr": ("nsr", {}),
    "orpo": ("orpo", {"beta": 0.4}),
    "ppo": ("ppo", {}),
    "ppo-all": ("ppo", {"epsilon_high": 0.3, "beta": 0.05, "entropy_coef": 0.02, "dual_clip": 3.0}),
    "psr": ("psr", {"loss_agg_mode": "seq-mean-token-sum"}),
    "reinforce_plus_plus": ("reinforce_plus_plus", {"kl_estimator": "k2", "beta": 0.01}),
    "rloo": ("rloo", {"epsilon": 0.1}),
    "robust": ("robust", {"label_smoothing": 0.2}),
    "sapo": ("sapo", {}),
    "sft": ("sft", {}),
    "sft-paired": ("sft", {"paired": True}),
    "sigmoid": ("sigmoid", {}),
    "sigmoid-alpha": ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}),
    "sigmoid-forward": ("sigmoid", {"f_divergence_type": "forward_kl"}),
    "sigmoid-ld": ("sigmoid", {"ld_alpha": 0.3}),
    "sigmoid-wpo": ("sigmoid", {"use_weighting": True}),
    "sigmoid-zero-beta": ("sigmoid", {"beta": 0.0}),
    "sigmoid_norm": ("sigmoid_norm", {"beta": 2.0, "ld_alpha": 0.3}),
    "simpo": ("simpo", {"beta": 2.0, "label_smoothing": 0.1}),
    "sppo_hard": ("sppo_hard", {"beta": 0.4}),
    "topr": ("topr", {}),
    "vespo": ("vespo", {"beta": 0.05}),
    "w_reinforce": ("w_reinforce", {"loss_agg_mode": "seq-mean-token-mean"}),
}


def create(case: str) -> losses.Loss:
    name, hyperparameters = CASES[case]
    return losses.create(name, **hyperparameters)


def make_labels(lengths: list[int], width: int) -> Tensor:
    """(B, S) labels with that many loss tokens in each row, after one ignored prompt position."""
    labels = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        labels[row, 1 : 1 + length] = torch.randint(0, 11, (length,))
    return labels


def side_inputs(loss: losses.Loss, labels: Tensor, logp: Tensor) -> dict[str, Tensor]:
    """Every side input that the loss reads, near enough to the policy that no term is saturated."""
    count = labels.shape[0]
    noise = torch.randn(labels.shape, dtype=torch.float64)
    sums = torch.where(labels >= 0, logp, 0.0).sum(1)
    # what policy losses read token by token, and LD-DPO weights token by token
    token_level = "advantage" in loss.needs or getattr(loss, "ld_alpha", None) is not None
    made = {
        "ref_logp": logp + 0.5 * noise if token_level else sums + 2.0 * noise[:, 0],
        "old_logp": logp + 0.3 * noise.flip(0),
        "sampling_logp": logp + 0.3 * noise,
        "nll_mask": torch.rand(labels.shape) < 0.3,
        "advantage": torch.randn(labels.shape, dtype=torch.float64),
        "importance_weight": torch.rand(labels.shape, dtype=torch.float64) + 0.5,
        "row_weight": torch.rand(labels.shape, dtype=torch.float64),
        "desirable": torch.arange(count) % 2 == 0,
        "kl": torch.tensor(0.3, dtype=torch.float64),
        "shift": torch.tensor(0.1, dtype=torch.float64),
    }
    return {name: made[name] for name in sorted(loss.needs & SIDE_INPUTS)}


def make_batch(
    loss: losses.Loss, lengths: list[int], *, masked: bool = False, seed: int = 0
) -> tuple[Stats, Batch, Layout]:
    """Statistics and batch of a call; ``masked`` plans from shapes, with ignored rows among the others."""
    torch.manual_seed(seed)
    labels = make_labels(lengths, max(lengths, default=0) + 2)
    logp = -torch.rand(labels.shape, dtype=torch.float64) * 3
    inputs = side_inputs(loss, labels, logp)
    layout = Layout.of(labels, static_plan(labels, False) if masked else make_plan(labels))
    batch = call_batch(layout, inputs, None, None, torch.float64)
    packed = {
        "logp": logp,
        "entropy": torch.rand(labels.shape, dtype=torch.float64) * 2,
        "lse": torch.randn(labels.shape, dtype=torch.float64),
        "mean_logit": torch.randn(labels.shape, dtype=torch.float64),
        "is_top1": torch.rand(labels.shape) < 0.5,
        "log_sum_sq_probs": -torch.rand(labels.shape, dtype=torch.float64) * 3,
        "max_logp": -torch.rand(labels.shape, dtype=torch.float64),
    }
    stats = Stats(**{name: layout.rows.gather(value.reshape(-1)) for name, value in packed.items()})
    return stats, batch, layout


def chunks_of(loss: losses.Loss, stats: Stats, batch: Batch, lengths: list[int], capacity: int):
    """The call in chunks of whole horizons: pairs of statistics and batch."""
    segments = torch.tensor(lengths)
    plan = replace(make_plan(make_labels(lengths, max(lengths) + 2)), rows=None, segments=segments)
    for chunk in cut(plan, loss.horizon, capacity):
        part = Stats(**{name: chunk.rows.take(value) for name, value in stats.present().items()})
        yield part, chunk_batch(batch, chunk), chunk
