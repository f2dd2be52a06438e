"""What a method is, from hidden states (or logits) to a loss, and those of this project and of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_po import linear_loss, linear_token_stats, token_stats
from fused_po.bench.cases import Case, Problem
from fused_po.kernels.select import BACKENDS, select, unsupported

__all__ = ["OURS", "Absent", "Method", "Outcome", "of_torch", "ours", "refusal"]

# the loss, and the log-probs (B, S) where the method returns any
Outcome = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Method:
    """A way to a loss.

    Attributes:
        name: what ``--methods`` takes; in brackets the backend, where that is not the first that runs.
        call: forward, for a problem.
        ours: of this project: refused where its results are wrong.
        backend: of this project's.
        without_reference: it cannot take reference log-probs, and solves the problem that has none.
    """

    name: str
    call: Callable[..., Outcome]
    ours: bool = False
    backend: str | None = None
    without_reference: bool = False

    @property
    def tiled(self) -> bool:
        """Of this project, and not from full logits."""
        return self.ours and not self.name.startswith("token_stats")

    def problem(self, problem: Problem) -> Problem:
        """What it solves."""
        return problem.without_reference() if self.without_reference else problem


class Absent(Exception):
    """Why a method does not run a case."""


def _by_linear_loss(problem: Problem, backend: str | None = None) -> Outcome:
    case = problem.case
    loss, inputs = case.objective.loss(problem.beta), case.objective.side_inputs(problem)
    options: dict[str, Any] = {"plan": problem.plan, "scratch_bytes": case.scratch_bytes, "backend": backend}
    out = linear_loss(problem.hidden, problem.weight, problem.labels, loss, **options, **inputs)
    return out.loss, out.stats.logp


def _outputs(case: Case) -> tuple[str, ...]:
    return ("logp", "entropy") if case.objective.entropy else ("logp",)


def _by_linear_token_stats(problem: Problem, backend: str | None = None) -> Outcome:
    case = problem.case
    stats = linear_token_stats(
        problem.hidden,
        problem.weight,
        problem.labels,
        outputs=_outputs(case),
        plan=problem.plan,
        scratch_bytes=case.scratch_bytes,
        backend=backend,
    )
    assert stats.logp is not None
    return problem.on_top(stats.logp, stats.entropy), stats.logp


def _by_token_stats(problem: Problem, backend: str | None = None) -> Outcome:
    """From logits, which are made in full where the case has none."""
    logits = problem.hidden @ problem.weight.t() if problem.logits is None else problem.logits
    # nobody else reads those made here: their gradient may overwrite them
    inplace = problem.logits is None
    stats = token_stats(logits, problem.labels, outputs=_outputs(problem.case), inplace=inplace, backend=backend)
    assert stats.logp is not None
    return problem.on_top(stats.logp, stats.entropy), stats.logp


def _textbook(logits: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_p = logits.float().log_softmax(-1)
    logp = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1) if entropy else None


def _from_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    return _textbook(hidden @ weight.t(), labels, entropy)


def _by_torch(problem: Problem, wrap: Callable[[Any], Any] = lambda function: function) -> Outcome:
    """Plain torch: logits in the dtype of the model, log-softmax in float32."""
    entropy = problem.case.objective.entropy
    if problem.logits is None:
        logp, found = wrap(_from_hidden)(problem.hidden, problem.weight, problem.labels, entropy)
    else:
        logp, found = wrap(_textbook)(problem.logits, problem.labels, entropy)
    return problem.on_top(logp, found), logp


OURS = {
    "linear_loss": _by_linear_loss,
    "linear_token_stats": _by_linear_token_stats,
    "token_stats": _by_token_stats,
}


def ours(problem: Problem, device: str) -> tuple[list[Method], dict[str, str]]:
    """Every route on every backend; the bare name is the backend that a call without a request takes."""
    case, found, absent = problem.case, [], {}
    sample = torch.zeros(1, 8, device=device, dtype=case.dtype)
    first = select("row_softmax", sample, None).__name__
    chosen = next(name for name, module in BACKENDS.items() if module == first)
    for name, call in OURS.items():
        if case.from_logits and name != "token_stats":
            absent[name] = "the case starts from logits"
            continue
        found.append(Method(name, call, True, chosen))
        for backend in BACKENDS:
            if backend == chosen:
                continue
            reason = refusal(backend, "row_softmax", sample)
            if device == "cpu" and backend == "triton":
                reason = "interpreted on a CPU, for tests"
            if reason is None:
                found.append(Method(f"{name}[{backend}]", partial(call, backend=backend), True, backend))
            else:
                absent[f"{name}[{backend}]"] = reason
    return found, absent


def refusal(backend: str, kernel: str, sample: Tensor) -> str | None:
    """Why a backend is not timed on such logits."""
    if backend == "reference" and sample.is_cuda:
        return "made for the caches of a CPU"
    return unsupported(backend, kernel, sample)


def of_torch() -> list[Method]:
    """Eager and compiled: shapes are part of a case, so each may be compiled for its own."""
    compiled = partial(_by_torch, wrap=partial(torch.compile, dynamic=False))
    return [Method("eager", _by_torch), Method("compile", compiled)]
