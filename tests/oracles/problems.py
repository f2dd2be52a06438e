"""Hidden states, heads and labels for implementations that start from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_po import linear_loss, losses

B, S, H, V = 6, 9, 16, 37
LENGTHS = [6, 3, 8, 1, 5, 7]


class HeadProblem:
    """Completions after prompts of two positions; the reference is another head on other hidden states."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.hidden, self.weight = torch.randn(B, S, H), torch.randn(V, H) * 0.5
        self.ref_hidden = self.hidden + 0.3 * torch.randn(B, S, H)
        self.ref_weight = self.weight + 0.05 * torch.randn(V, H)
        self.labels = torch.full((B, S), -100)
        for row, length in enumerate(LENGTHS):
            self.labels[row, 1 : 1 + length] = torch.randint(0, V, (length,))
        self.keep = self.labels >= 0
        self.ref_logp = self.token_logp(self.ref_hidden, self.ref_weight)
        self.old_logp = self.zeroed(self.token_logp(self.hidden, self.weight) + 0.15 * torch.randn(B, S))
        self.advantage = torch.randn(B)
        self.desirable = torch.tensor([True, False, False, True, True, False])
        self.importance = torch.where(self.keep, torch.rand(B, S) + 0.5, 1.0)

    def zeroed(self, values: Tensor) -> Tensor:
        return torch.where(self.keep, values, 0.0)

    def token_logp(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """By the textbook, 0 where ignored."""
        logp = (hidden @ weight.t()).log_softmax(-1)
        return self.zeroed(logp.gather(-1, self.labels.clamp_min(0)[..., None])[..., 0])

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def check(
        self,
        loss: losses.Loss,
        value: Tensor,
        leaves: tuple[Tensor, ...],
        labels: Tensor | None = None,
        amplified: bool = False,
        **given: Any,
    ) -> dict[str, Tensor]:
        """Value to 1e-6 and the rounding of its terms, gradients of hidden states and head to 1e-5; our metrics.

        Squares, exponentials and ratios of whole sequences amplify the rounding of float32 beyond that. A case that is
        said to be ``amplified`` may differ by ten times as much where ours lies nearer to the same loss in float64, and
        must need it.
        """
        labels = self.labels if labels is None else labels
        metrics, ours = self.fused(loss, labels, torch.float32, given)
        _, truth = self.fused(loss, labels, torch.float64, given)
        theirs = (value.detach(), *torch.autograd.grad(value, leaves))
        # terms that cancel leave their rounding behind
        rounding = torch.finfo(torch.float32).eps * (truth[1] * self.hidden.double()).abs().sum().item()
        needed = False
        for mine, want, exact, most in zip(ours, theirs, truth, (1e-6, 1e-5, 1e-5), strict=True):
            bound = most * want.norm().item() + (rounding if want.dim() == 0 else 0.0)
            apart = (mine - want).norm().item()
            nearer = (mine - exact).norm() <= (want - exact).norm()
            assert apart <= bound or (amplified and apart <= 10 * bound and nearer)
            needed |= apart > bound
        assert needed or not amplified, "the allowance is not needed any more"
        return metrics

    def fused(
        self, loss: losses.Loss, labels: Tensor, dtype: torch.dtype, given: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Our metrics; our value and gradients of hidden states and head."""
        hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves())
        out = linear_loss(hidden, weight, labels, loss, **given)
        return out.metrics, (out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight)))
