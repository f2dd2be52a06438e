"""Every way against float64 before its time is believed.

A result may be off by twice what plain torch is off in the dtype of the case, plus the rounding of the result itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Problem
from bench.ways import Way

# rows of the hidden gradient, and rows of the weight gradient, that are compared
SAMPLE = 64
# rows whose logits exist at a time
BLOCK = 512

Results = dict[str, Tensor]


class Reference:
    """Loss, log-probs and a sample of the gradients from full logits in a dtype, a block of rows at a time.

    Written with the formulas of the softmax, not with autograd, so that a case of any size fits. In float64 it is the
    truth; in the dtype of the case it rounds where plain torch does (logits and their gradient to that dtype) and tells
    how far off plain torch is.
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem, self.dtype = problem, dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        case, device = problem.case, problem.labels.device
        generator = torch.Generator().manual_seed(1)
        rows = torch.randperm(case.tokens, generator=generator)[:SAMPLE].to(device)
        self.rows = rows
        self.weight = problem.weight.detach().to(dtype)  # (V, H)
        # classes that are somebody's label, and any others
        others = torch.randint(case.vocab, (SAMPLE // 2,), generator=generator).to(device)
        self.classes = torch.cat([problem.labels.flatten()[rows[: SAMPLE // 2]], others])

    @torch.no_grad()
    def compute(self) -> Results:
        problem = self.problem
        labels, count = problem.labels.flatten(), problem.case.tokens
        logp = labels.new_empty(count, dtype=self.wide)
        lse = torch.empty_like(logp)
        for first in range(0, count, BLOCK):
            block = slice(first, first + BLOCK)
            z = self._logits(block).to(self.wide)
            lse[block] = z.logsumexp(-1)
            logp[block] = z.gather(-1, labels[block].unsqueeze(-1)).squeeze(-1) - lse[block]
        with torch.enable_grad():
            leaf = logp.view_as(problem.labels).requires_grad_()
            loss = problem.on_top(leaf)
            (c,) = torch.autograd.grad(loss, leaf)
        self.c = c = c.flatten()  # (N,)
        found = {"loss": loss.detach(), "logp": logp}
        tile = self._tile(self._logits(self.rows), self.rows, None, lse, c)  # (SAMPLE, V)
        if problem.case.from_logits:
            return found | {"logits": tile}
        found["hidden"] = tile @ self.weight
        if not problem.case.frozen:
            hidden, weight = self._hidden(slice(None)), self.weight[self.classes]
            tile = self._tile(hidden @ weight.t(), slice(None), self.classes, lse, c)  # (N, SAMPLE)
            found["weight"] = tile.t() @ hidden
        return found

    def sample(self, loss: Tensor, logp: Tensor) -> Results:
        """The same of what a way returned and left in the leaves."""
        problem = self.problem
        found = {"loss": loss.detach(), "logp": logp.detach().flatten()}
        if problem.logits is not None:
            return found | {"logits": problem.logits.grad.flatten(0, 1)[self.rows]}
        found["hidden"] = problem.hidden.grad.flatten(0, 1)[self.rows]
        if not problem.case.frozen:
            found["weight"] = problem.weight.grad[self.classes]
        return found

    def _hidden(self, rows: slice | Tensor) -> Tensor:
        return self.problem.hidden.detach().flatten(0, 1)[rows].to(self.dtype)

    def _logits(self, rows: slice | Tensor) -> Tensor:
        if self.problem.logits is not None:
            return self.problem.logits.detach().flatten(0, 1)[rows].to(self.dtype)
        return self._hidden(rows) @ self.weight.t()

    def _tile(self, z: Tensor, rows: slice | Tensor, classes: Tensor | None, lse: Tensor, c: Tensor) -> Tensor:
        """c (1[v = y] - p_v) of some rows and classes (None: all)."""
        p = (z.to(self.wide) - lse[rows].unsqueeze(1)).exp_()
        columns = torch.arange(z.shape[1], device=z.device) if classes is None else classes
        hot = columns == self.problem.labels.flatten()[rows].unsqueeze(1)
        return ((hot.to(self.wide) - p) * c[rows].unsqueeze(1)).to(self.dtype)


def errors(got: Results, truth: Results) -> dict[str, float]:
    """||got - truth|| / ||truth||, nan if anything is."""
    return {name: ((got[name].double() - want).norm() / want.norm()).item() for name, want in truth.items()}


def bounds(problem: Problem) -> tuple[Results, dict[str, float]]:
    """The truth, and the largest error that is accepted of each of its results."""
    exact, plain = Reference(problem, torch.float64), Reference(problem, problem.case.dtype)
    truth, naive = exact.compute(), plain.compute()
    found = errors(naive, truth)
    # a single number is right by luck: what errors of the log-probs can do to it
    reach = (exact.c.abs() * (naive["logp"].double() - truth["logp"]).abs()).sum() / truth["loss"].abs()
    found["loss"] = reach.item()
    narrow = {"loss": torch.float32, "logp": torch.float32}
    return truth, allowed(found, {name: narrow.get(name, problem.case.dtype) for name in found})


def allowed(naive: dict[str, float], dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    """The largest error of each result, from that of plain torch and the dtype that it is rounded to."""
    return {name: 2 * error + torch.finfo(dtypes[name]).eps / 2 for name, error in naive.items()}


def way_errors(way: Way, problem: Problem, truth: Results) -> dict[str, float]:
    """Errors of one forward and backward of a way."""
    for leaf in problem.leaves:
        leaf.grad = None
    loss, logp = way(problem)
    loss.backward()
    return errors(Reference(problem, torch.float64).sample(loss, logp), truth)


def rejected(found: dict[str, float], bound: dict[str, float]) -> list[str]:
    """What is off by too much; nan is."""
    return [f"{name}: {found[name]:.2e} > {bound[name]:.2e}" for name in bound if not found[name] <= bound[name]]
