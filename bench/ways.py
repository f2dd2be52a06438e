"""The ways from hidden states (or logits) to a loss that compete: this project's, and the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from bench.cases import BETA, EPSILON, Problem
from fused_po import linear_loss, linear_token_stats, losses, token_stats

# returns the loss and the log-probs (B, S)
Way = Callable[[Problem], tuple[Tensor, Tensor]]
# the width of TRL's trainers
TRL_COLUMNS = 32768


def by_linear_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.case.loss == "sigmoid":
        loss, inputs = losses.create("sigmoid", beta=BETA), {"ref_logp": problem.ref_logp}
    else:
        loss = losses.create("dapo", epsilon=EPSILON)
        inputs = {"old_logp": problem.old_logp, "advantage": problem.advantage}
    out = linear_loss(problem.hidden, problem.weight, problem.labels, loss, plan=problem.plan, **inputs)
    return out.loss, out.stats.logp


def by_linear_token_stats(problem: Problem) -> tuple[Tensor, Tensor]:
    logp = linear_token_stats(problem.hidden, problem.weight, problem.labels, plan=problem.plan).logp
    return problem.on_top(logp), logp


def by_token_stats(problem: Problem) -> tuple[Tensor, Tensor]:
    logp = token_stats(problem.logits, problem.labels).logp
    return problem.on_top(logp), logp


def by_full_logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """Plain torch: logits in the dtype of the model, log-softmax in float32."""
    logits = problem.hidden @ problem.weight.t() if problem.logits is None else problem.logits
    logp = logits.float().log_softmax(-1).gather(-1, problem.labels.unsqueeze(-1)).squeeze(-1)
    return problem.on_top(logp), logp


def by_trl(problem: Problem, columns: int = TRL_COLUMNS) -> tuple[Tensor, Tensor]:
    """The function that TRL's trainers take log-probs from."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    hidden, labels = problem.hidden.flatten(0, 1), problem.labels.flatten()
    found = _ChunkedLogProbFunction.apply(hidden, problem.weight, None, labels, 1.0, columns, None, 1.0, ("log_probs",))
    logp = found[0].view_as(problem.labels)
    return problem.on_top(logp), logp


def competitors(from_logits: bool, trl_columns: int = TRL_COLUMNS) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that run here, ours first, and why the others do not."""
    if from_logits:
        return {"token_stats": by_token_stats, "full logits": by_full_logits}, {}
    ways: dict[str, Way] = {"linear_loss": by_linear_loss, "linear_token_stats": by_linear_token_stats}
    missing = {}
    try:
        from trl.trainer.utils import _ChunkedLogProbFunction  # noqa: F401

        ways["trl"] = partial(by_trl, columns=trl_columns)
    except Exception as error:
        # an import of TRL runs through half of the ecosystem and fails in many ways
        missing["trl"] = f"{type(error).__name__}: {error}"
    ways["full logits"] = by_full_logits
    return ways, missing


OURS = ("linear_loss", "linear_token_stats", "token_stats")
