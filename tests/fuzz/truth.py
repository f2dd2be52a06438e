"""What a drawn problem's result should be, by float64 autograd through full logits, and how far rounding may move it.

Bounds are those of rounding: so many units in the last place, times the sum of the absolute values of what is added
up, plus what rounding does to the log-probs and they to the coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_po.losses.batch import Batch
from fused_po.ops.batches import Layout, call_batch, masked_stats
from fused_po.ops.coefficients import coefficients
from fused_po.ops.plain import plain_loss, plain_stats
from fused_po.ops.planning import static_plan
from fused_po.stats import DIFFERENTIABLE, Stats
from tests.fuzz.draw import IGNORE, Problem

__all__ = ["ULPS", "Truth"]

# units in the last place: products and sums of a few dozen numbers, and a handful of kernels behind them
ULPS = 64


@dataclass
class Truth:
    """The result of a problem from full logits.

    Attributes:
        leaves: hidden states and head, rounded to the dtype that they are multiplied in.
        stats: (B, S) each, with a graph to the leaves.
        slack: (B, S) each, how far rounding may move them.
        batch, layout: of the padded problem.
    """

    problem: Problem
    leaves: dict[str, Tensor]
    stats: dict[str, Tensor]
    slack: dict[str, Tensor]
    batch: Batch
    layout: Layout

    @staticmethod
    def of(problem: Problem) -> Truth:
        leaves = {name: t.detach().to(problem.dtype).double() for name, t in problem.tensors().items()}
        if problem.bias is not None and problem.route != "token_stats":
            # added in the dtype of the products
            leaves["bias"] = problem.bias.detach().double()
        for leaf in leaves.values():
            leaf.requires_grad_()
        stats = plain_stats(_logits(problem, leaves), problem.labels, **_transform(problem)).present()
        layout = Layout.of(problem.labels, static_plan(problem.labels, False))
        side_inputs = {
            name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for name, v in problem.side_inputs.items()
        }
        normalisers = {"num_items": None, "num_sequences": None, **problem.normalisers}
        batch = call_batch(layout, side_inputs, dtype=torch.float64, **normalisers)
        return Truth(problem, leaves, stats, _slack(problem, leaves, stats), batch, layout)

    def plain(self) -> Tensor:
        """The value, (), by ``plain_loss``, with a graph to the leaves."""
        problem = self.problem
        options = {**_transform(problem), **problem.normalisers, **problem.side_inputs}
        return plain_loss(_logits(problem, self.leaves), problem.labels, problem.loss, **options)

    def coefficients(
        self, stats: dict[str, Tensor], *, moved: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Value, (c, e, l) at some statistics, and how far rounding may move these: (), (B, S) each.

        Args:
            stats: (B, S) each.
            moved: rounding moves the statistics, too.
        """
        problem, shape = self.problem, self.problem.labels.shape

        def at(sign: Tensor | float) -> tuple[Tensor, dict[str, Tensor]]:
            flat = {
                name: (v.detach() if v.dtype == torch.bool else v.detach() + sign * self.slack[name]).reshape(-1)
                for name, v in stats.items()
            }
            masked = masked_stats(Stats(**flat), self.layout.mask)
            value, triple = coefficients(problem.loss, masked, self.batch, problem.split)
            found = {name: c for name, c in zip(DIFFERENTIABLE, triple, strict=True) if c is not None}
            return value, {name: c.reshape(shape) for name, c in found.items()}

        value, triple = at(0.0)
        eps = torch.finfo(problem.wide).eps
        slack = {name: ULPS * eps * c.abs() for name, c in triple.items()}
        if moved:
            noise = torch.randn(shape, dtype=torch.float64).sign()
            for sign in (1.0, -1.0, noise, -noise):
                other = at(sign)[1]
                slack = {name: slack[name] + (other[name] - c).abs() for name, c in triple.items()}
        return value, triple, slack

    def through(self, triple: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients that coefficients (B, S) make through full logits."""
        keep = self.problem.labels != IGNORE
        total = sum(torch.where(keep, c * self.stats[name], 0.0).sum() for name, c in triple.items())
        got = torch.autograd.grad(total, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(self.leaves.items(), got, strict=True)
        }

    def bounds(self, triple: dict[str, Tensor], slack: dict[str, Tensor]) -> dict[str, Tensor]:
        """How far rounding may move each gradient, for coefficients (B, S) that it moves by ``slack``."""
        problem = self.problem
        with torch.no_grad():
            relative = (self.slack["entropy"] + self.slack["logp"]).amax()
            narrow = torch.finfo(problem.dtype)
            added, moved, factors = self._added(triple), self._added(slack), self._factors()
            # what is too small for the dtype: entries of a tile, and of the result
            small = ULPS * narrow.smallest_normal * (narrow.eps if problem.dtype == torch.float16 else 1.0)
            most = max((float(c.abs().amax()) for c in triple.values()), default=0.0)
            return {
                name: (16 * narrow.eps + relative) * size + 2.0 * moved[name] + small * (1.0 + most * factors[name])
                for name, size in added.items()
            }

    def _added(self, triple: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the absolute values of what is added up in the gradient of each leaf."""
        problem, transform = self.problem, _transform(self.problem)
        temperature = transform["temperature"]
        temperature = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        logits = _logits(problem, self.leaves) * problem.logit_scale
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        log_p = (logits / temperature).log_softmax(-1)
        p = log_p.exp()
        at = torch.zeros_like(p)  # (B, S, V)
        if "logp" in triple:
            target = torch.nn.functional.one_hot(problem.labels.clamp_min(0), problem.classes)
            at += triple["logp"].abs().unsqueeze(-1) * (target + p)
        if "entropy" in triple:
            inner = log_p.abs() + self.stats["entropy"].unsqueeze(-1).abs() + 1.0
            at += triple["entropy"].abs().unsqueeze(-1) * torch.where(p > 0, p * inner, 0.0)
        if "lse" in triple:
            at += triple["lse"].abs().unsqueeze(-1) * p
        keep = (problem.labels != IGNORE).double().unsqueeze(-1)
        at = at * keep * abs(problem.logit_scale) / temperature
        size = at.shape[-1]
        hidden, weight = self.leaves["hidden"].abs(), self.leaves["weight"].abs()
        outer = at.reshape(-1, size).t() @ hidden.reshape(-1, hidden.shape[-1])
        pad = weight.shape[0] - size
        found = {"hidden": at @ weight[:size], "weight": torch.nn.functional.pad(outer, (0, 0, 0, pad))}
        if "bias" in self.leaves:
            found["bias"] = torch.nn.functional.pad(at.sum((0, 1)), (0, pad))
        return found

    def _factors(self) -> dict[str, Tensor]:
        """Sums over all classes and rows of what a tile is multiplied with."""
        hidden, weight = self.leaves["hidden"].abs(), self.leaves["weight"].abs()
        found = {"hidden": weight.sum(0).expand_as(hidden), "weight": hidden.sum((0, 1)).expand_as(weight)}
        if "bias" in self.leaves:
            found["bias"] = torch.full_like(self.leaves["bias"], float(self.problem.labels.numel()))
        return found


def _logits(problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
    logits = leaves["hidden"] @ leaves["weight"].t()
    logits = logits + leaves["bias"] if "bias" in leaves else logits
    return logits[..., : problem.classes]


def _transform(problem: Problem) -> dict[str, Any]:
    temperature = problem.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.double()
        temperature = temperature.unsqueeze(1) if temperature.ndim == 1 else temperature
    return {"temperature": temperature, "softcap": problem.softcap, "logit_scale": problem.logit_scale}


def _slack(problem: Problem, leaves: dict[str, Tensor], stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far rounding may move each statistic, (B, S)."""
    with torch.no_grad():
        size = leaves["hidden"].abs() @ leaves["weight"].abs().t()
        size = size + leaves["bias"].abs() if "bias" in leaves else size
        temperature = _transform(problem)["temperature"]
        size = size[..., : problem.classes].amax(-1) * abs(problem.logit_scale) / temperature  # (B, S)
        # full logits in the dtype of the input are rounded to it
        eps = torch.finfo(problem.dtype if problem.route == "token_stats" else problem.wide).eps
        unit = ULPS * eps * (1.0 + size)
        spread = 1.0 + stats["entropy"].abs() + size
        return {name: unit * (spread if name == "entropy" else 2.0) for name in stats}
