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
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "conservative": ("conservative", {"label_smoothing": 0.2}),
    "dapo": ("dapo", {}),
    "dapo-all": ("dapo", {"epsilon_high": 0.28, "beta": 0.05, "entropy_coef": 0.01, "delta": 1.5}),
    "dapo-plain-kl": ("dapo", {"beta": 0.05, "use_bias_correction_kl": False}),
    "hinge": ("hinge", {"beta": 0.3}),
    "ipo": ("ipo", {"beta": 0.4}),
    "kto": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    "ppo": ("ppo", {}),
    "ppo-all": ("ppo", {"epsilon_high": 0.3, "beta": 0.05, "entropy_coef": 0.02, "dual_clip": 3.0}),
    "sft": ("sft", {}),
    "sft-paired": ("sft", {"paired": True}),
    "sigmoid": ("sigmoid", {}),
    "simpo": ("simpo", {"beta": 2.0, "label_smoothing": 0.1}),
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
    token_level = loss.horizon == "token"
    made = {
        "ref_logp": logp + 0.5 * noise if token_level else sums + 2.0 * noise[:, 0],
        "old_logp": logp + 0.3 * noise.flip(0),
        "advantage": torch.randn(labels.shape, dtype=torch.float64),
        "importance_weight": torch.rand(count, dtype=torch.float64) + 0.5,
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
