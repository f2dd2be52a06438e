"""Every method against float64 before its time is believed.

A result may be off by twice what the formulas of the softmax are off in the dtype of the case, plus the rounding of
the result itself. Plain torch may be over that: its ``log_softmax`` loses more on a wide row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_po.bench.cases import Problem
from fused_po.bench.methods import Method

# rows of the hidden gradient, and rows of the weight gradient, that are compared
SAMPLE = 64
# rows whose logits exist at a time
BLOCK = 512

Results = dict[str, Tensor]

__all__ = ["allowed", "bounds", "errors", "method_errors", "rejected"]


class Reference:
    """Loss, log-probs and a sample of the gradients from full logits in a dtype, a block of rows at a time.

    Written with the formulas of the softmax, not with autograd, so that a case of any size fits. In float64 it is the
    truth; in the dtype of the case it rounds where plain torch does, logits and their gradient to that dtype, and tells
    how far off that is.
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
        lse, entropy = torch.empty_like(logp), torch.zeros_like(logp)
        for first in range(0, count, BLOCK):
            block = slice(first, first + BLOCK)
            z = self._logits(block).to(self.wide)
            lse[block] = z.logsumexp(-1)
            logp[block] = z.gather(-1, labels[block].unsqueeze(-1)).squeeze(-1) - lse[block]
            if problem.case.objective.entropy:
                # not in place: z may be the logits of the problem
                log_p = z - lse[block].unsqueeze(1)
                entropy[block] = -log_p.exp().mul_(log_p).sum(-1)
        with torch.enable_grad():
            leaves = [value.view_as(problem.labels).requires_grad_() for value in (logp, entropy)]
            loss = problem.on_top(*leaves)
            c, e = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        self.c, self.e, self.lse, self.entropy = c.flatten(), e.flatten(), lse, entropy.detach()  # (N,) each
        found = {"loss": loss.detach(), "logp": logp.detach()}
        tile = self._tile(self._logits(self.rows), self.rows, None)  # (SAMPLE, V)
        if problem.case.from_logits:
            return found | {"logits": tile}
        found["hidden"] = tile @ self.weight
        if not problem.case.frozen:
            hidden, weight = self._hidden(slice(None)), self.weight[self.classes]
            tile = self._tile(hidden @ weight.t(), slice(None), self.classes)  # (N, SAMPLE)
            found["weight"] = tile.t() @ hidden
        return found

    def sample(self, loss: Tensor, logp: Tensor | None) -> Results:
        """The same of what a method returned and left in the leaves; log-probs only where it returns them."""
        problem = self.problem
        found = {"loss": loss.detach()} | ({} if logp is None else {"logp": logp.detach().flatten()})
        if problem.logits is not None:
            return found | {"logits": _gradient(problem.logits).flatten(0, 1)[self.rows]}
        found["hidden"] = _gradient(problem.hidden).flatten(0, 1)[self.rows]
        if not problem.case.frozen:
            found["weight"] = _gradient(problem.weight)[self.classes]
        return found

    def _hidden(self, rows: slice | Tensor) -> Tensor:
        return self.problem.hidden.detach().flatten(0, 1)[rows].to(self.dtype)

    def _logits(self, rows: slice | Tensor) -> Tensor:
        if self.problem.logits is not None:
            return self.problem.logits.detach().flatten(0, 1)[rows].to(self.dtype)
        return self._hidden(rows) @ self.weight.t()

    def _tile(self, z: Tensor, rows: slice | Tensor, classes: Tensor | None) -> Tensor:
        """c (1[v = y] - p_v) - e p_v (log p_v + entropy) of some rows and classes (None: all)."""
        log_p = z.to(self.wide) - self.lse[rows].unsqueeze(1)
        p = log_p.exp()
        columns = torch.arange(z.shape[1], device=z.device) if classes is None else classes
        hot = columns == self.problem.labels.flatten()[rows].unsqueeze(1)
        tile = (hot.to(self.wide) - p).mul_(self.c[rows].unsqueeze(1))
        if self.problem.case.objective.entropy:
            tile -= self.e[rows].unsqueeze(1) * p * (log_p + self.entropy[rows].unsqueeze(1))
        return tile.to(self.dtype)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def errors(got: Results, truth: Results) -> dict[str, float]:
    """||got - truth|| / ||truth|| of what there is, nan if anything is."""
    return {name: ((value.double() - truth[name]).norm() / truth[name].norm()).item() for name, value in got.items()}


def bounds(problem: Problem) -> tuple[Results, dict[str, float]]:
    """The truth, and the largest error that is accepted of each of its results."""
    exact, plain = Reference(problem, torch.float64), Reference(problem, problem.case.dtype)
    truth, naive = exact.compute(), plain.compute()
    found = errors(naive, truth)
    # a single number is right by luck: what errors of the statistics can do to it
    reach = (exact.c.abs() * (naive["logp"].double() - truth["logp"]).abs()).sum()
    reach = reach + (exact.e.abs() * (plain.entropy.double() - exact.entropy).abs()).sum()
    found["loss"] = (reach / truth["loss"].abs()).item()
    narrow = {"loss": torch.float32, "logp": torch.float32}
    return truth, allowed(found, {name: narrow.get(name, problem.case.dtype) for name in found})


def allowed(naive: dict[str, float], dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    """The largest error of each result, from that of the formulas and the dtype that it is rounded to."""
    return {name: 2 * error + torch.finfo(dtypes[name]).eps / 2 for name, error in naive.items()}


def method_errors(method: Method, problem: Problem, truth: Results) -> dict[str, float]:
    """Errors of one forward and backward of a method."""
    for leaf in problem.leaves:
        leaf.grad = None
    loss, logp = method.call(problem)
    loss.backward()
    return errors(Reference(problem, torch.float64).sample(loss, logp), truth)


def rejected(found: dict[str, float], bound: dict[str, float]) -> list[str]:
    """What is off by too much; nan is."""
    return [f"{name}: {error:.2e} > {bound[name]:.2e}" for name, error in found.items() if not error <= bound[name]]
