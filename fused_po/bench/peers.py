"""Methods of other packages, through their public interfaces, each with the reason why it does not run a case."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_po.bench.cases import Case, Problem
from fused_po.bench.methods import Absent, Method, Outcome
from fused_po.bench.objectives import EPSILON, KL_WEIGHT

__all__ = ["PEERS"]

# the width of TRL's trainers
TRL_COLUMNS = 32768


def _from_nll(problem: Problem, nll: Tensor, entropy: Tensor | None = None) -> Outcome:
    logp = -nll.view_as(problem.labels).float()
    return problem.on_top(logp, None if entropy is None else entropy.view_as(logp)), logp


def _flat(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.hidden.flatten(0, 1), problem.labels.flatten()


def _trl(case: Case, device: str) -> Method:
    """The function that TRL's trainers take log-probs from."""
    function = import_module("trl.trainer.utils")._ChunkedLogProbFunction

    def call(problem: Problem, columns: int = TRL_COLUMNS) -> Outcome:
        hidden, labels = _flat(problem)
        asked = ("entropy",) if case.objective.entropy else ()
        found = function.apply(hidden, problem.weight, None, labels, 1.0, columns, None, 1.0, asked)
        logp = found[0].view_as(problem.labels)
        return problem.on_top(logp, found[1].view_as(logp) if asked else None), logp

    return Method("trl", call)


def _liger(case: Case, device: str) -> Method:
    """Losses that return a scalar alone. Compiled on a GPU, as it does by default."""
    package = import_module("liger_kernel.chunked_loss")
    compiled = device == "cuda"
    options: dict[str, Any] = {"compiled": compiled}
    if case.loss in ("dpo", "kto"):
        # a reference is its hidden states and head there: another product
        options |= {"use_ref_model": False}
        if case.loss == "dpo":
            return Method("liger", partial(_liger_dpo, package, options), without_reference=True)
        return Method("liger", partial(_liger_kto, package, options), without_reference=True)
    if case.loss not in ("grpo", "dapo"):
        raise Absent(f"has no such loss ({case.objective.title})")
    beta = KL_WEIGHT if case.loss == "grpo" else 0.0
    options |= {"loss_type": case.loss, "beta": beta, "epsilon_low": EPSILON, "epsilon_high": EPSILON}
    return Method("liger", partial(_liger_grpo, package, options | {"use_ref_model": beta != 0.0}))


def _liger_dpo(package: Any, options: dict[str, Any], problem: Problem) -> Outcome:
    loss = package.LigerFusedLinearDPOLoss(beta=problem.beta, **options)
    return loss(problem.weight, problem.hidden, problem.labels)[0], None


def _liger_kto(package: Any, options: dict[str, Any], problem: Problem) -> Outcome:
    loss = package.LigerFusedLinearKTOLoss(beta=problem.beta, **options)
    kl = problem.kl.to(problem.hidden.dtype)
    found = loss(problem.hidden, problem.weight, problem.labels, preference_labels=problem.desirable, kl=kl)
    return (found[0] if isinstance(found, tuple) else found), None


def _liger_grpo(package: Any, options: dict[str, Any], problem: Problem) -> Outcome:
    loss = package.LigerFusedLinearGRPOLoss(**options)
    found = loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        torch.ones_like(problem.labels),
        problem.advantage,
        ref_per_token_logps=problem.ref_token_logp if options["use_ref_model"] else None,
        old_per_token_logps=problem.old_logp,
    )
    return found[0], None


def _liger_ce(case: Case, device: str) -> Method:
    function = import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    entropy = case.objective.entropy

    def call(problem: Problem) -> Outcome:
        hidden, labels = _flat(problem)
        apply = function.LigerFusedLinearScaledCrossEntropyFunction.apply
        found = apply(hidden, problem.weight, labels, return_entropy=entropy)
        return _from_nll(problem, *found) if entropy else _from_nll(problem, found)

    return Method("liger_ce", call)


def _needs_logp_alone(case: Case) -> None:
    if case.objective.entropy:
        raise Absent("gives no entropy")


def _cce(case: Case, device: str) -> Method:
    _needs_logp_alone(case)
    function = import_module("cut_cross_entropy").linear_cross_entropy
    # its kernel needs a GPU
    impl = "cce" if device == "cuda" else "torch_compile"

    def call(problem: Problem) -> Outcome:
        hidden, labels = _flat(problem)
        return _from_nll(problem, function(hidden, problem.weight, labels, reduction="none", impl=impl))

    return Method("cce", call)


def _torch_lce(case: Case, device: str) -> Method:
    _needs_logp_alone(case)
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")

    def call(problem: Problem) -> Outcome:
        hidden, labels = _flat(problem)
        if case.loss == "sft":
            # a scalar needs one product less there
            return function(hidden, problem.weight, labels, options=options()), None
        return _from_nll(problem, function(hidden, problem.weight, labels, reduction="none", options=options()))

    return Method("torch_lce", call)


def _quack(case: Case, device: str) -> Method:
    if case.loss != "sft":
        raise Absent("gives a mean cross entropy alone")
    if device != "cuda":
        raise Absent("needs a GPU")
    function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def call(problem: Problem) -> Outcome:
        hidden, labels = _flat(problem)
        return function(hidden, problem.weight, labels), None

    return Method("quack", call)


PEERS: dict[str, Callable[[Case, str], Method]] = {
    "trl": _trl,
    "liger": _liger,
    "liger_ce": _liger_ce,
    "cce": _cce,
    "torch_lce": _torch_lce,
    "quack": _quack,
}
