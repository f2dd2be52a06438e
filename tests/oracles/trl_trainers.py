"""Statistics of a batch for TRL's trainers and for our losses, and the comparison of the two.

A trainer is replaced by a namespace that holds the settings its ``_compute_loss`` reads, its model by a function that
hands out the statistics; so the arithmetic is that of the installed TRL, whatever its version.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_po import losses
from fused_po.ops.batches import Layout, call_batch
from fused_po.ops.coefficients import coefficients
from fused_po.ops.planning import make_plan
from fused_po.stats import Stats

IGNORE = -100
LENGTHS = [5, 3, 7, 1, 4, 6, 2, 7]
PROMPT = 3


class Accelerator(SimpleNamespace):
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, **_):
        return tensor


class Model(torch.nn.Module):
    """In training, with nothing that TRL asks about."""

    is_gradient_checkpointing = False


class Problem:
    """Random statistics of completions after prompts of one length; (B, S) for tokens that are predicted."""

    def __init__(self, seed: int = 0, spread: float = 1.0) -> None:
        torch.manual_seed(seed)
        count, width = len(LENGTHS), PROMPT + max(LENGTHS)
        self.completion_mask = torch.zeros(count, width, dtype=torch.long)
        for row, length in enumerate(LENGTHS):
            self.completion_mask[row, PROMPT : PROMPT + length] = 1
        self.input_ids = torch.randint(0, 9, (count, width))
        self.attention_mask = self.completion_mask.clone()
        self.attention_mask[:, :PROMPT] = 1
        self.labels = self.input_ids.masked_fill(self.completion_mask == 0, IGNORE)[:, 1:]
        self.keep = self.labels != IGNORE
        shape = self.labels.shape
        self.logp = self.zeroed(-3 * torch.rand(shape))
        self.entropy = self.zeroed(2 * torch.rand(shape))
        self.mean_logit = self.zeroed(torch.randn(shape))
        self.is_top1 = (torch.rand(shape) < 0.5) & self.keep
        self.log_sum_sq_probs = self.zeroed(-3 * torch.rand(shape))
        self.ref_logp = self.zeroed(self.logp + 0.5 * spread * torch.randn(shape))
        self.old_logp = self.zeroed(self.logp + 0.2 * spread * torch.randn(shape))
        self.sampling_logp = self.zeroed(self.old_logp + 0.2 * torch.randn(shape))
        self.advantages = torch.randn(count)
        self.desirable = torch.rand(count) < 0.5

    def zeroed(self, values: Tensor) -> Tensor:
        return torch.where(self.keep, values, 0.0)

    def leaves(self) -> dict[str, Tensor]:
        return {"log_probs": self.logp.clone().requires_grad_(), "entropy": self.entropy.clone().requires_grad_()}

    def ours(self, loss: losses.Loss, num_items: float | None = None, **side_inputs: Tensor):
        """Value, gradients of log-probs and entropy in the shape of labels, and metrics."""
        loss.check(frozenset(side_inputs))
        layout = Layout.of(self.labels, make_plan(self.labels))
        batch = call_batch(layout, side_inputs, num_items, None, torch.float32)
        names = ("logp", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
        dense = {name: getattr(self, name) for name in names}
        stats = Stats(**{name: layout.rows.gather(value.reshape(-1)) for name, value in dense.items()})
        value, triple = coefficients(loss, stats, batch)
        gradients = [None if c is None else layout.fill(c) for c in triple[:2]]
        return value, gradients, loss.metrics(stats, batch), self.keep

    def completions(self, values: Tensor) -> Tensor:
        """The positions from the first completion token on."""
        return values[:, PROMPT - 1 :]


def check(found, value: Tensor, leaves: dict[str, Tensor], metrics: dict[str, list[float]], ignored=()) -> None:
    """Value to 1e-6, gradients to 1e-5, every metric that TRL logged and that statistics determine."""
    ours, gradients, our_metrics, keep = found
    # terms that cancel leave their rounding behind
    given = [(g, leaf) for g, leaf in zip(gradients, leaves.values(), strict=True) if g is not None]
    terms = sum((g.double() * leaf.detach().double()).abs().sum().item() for g, leaf in given)
    bound = 1e-6 * abs(value.item()) + 4 * torch.finfo(torch.float32).eps * terms
    assert abs(ours.item() - value.item()) <= bound
    value.backward()
    for leaf, mine in zip(leaves.values(), gradients, strict=True):
        want = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        mine = torch.zeros_like(want) if mine is None else mine
        assert (mine - want * keep).norm() <= 1e-5 * (want * keep).norm()
    # counted by the trainer over the whole run
    for name in metrics.keys() - {"num_tokens", *ignored}:
        want = metrics[name][-1]
        assert name in our_metrics, name
        assert our_metrics[name].item() == pytest.approx(want, rel=2e-5, abs=1e-6, nan_ok=True), name
    assert not our_metrics.keys() - metrics.keys()
