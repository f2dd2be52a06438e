"""A drawn problem through its operation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_po import linear_loss, linear_token_stats, make_plan, stats_loss, token_stats
from fused_po.ops.planning import static_plan
from fused_po.stats import STATISTICS
from tests.fuzz.draw import Problem

__all__ = ["Found", "operate"]


@dataclass
class Found:
    """What an operation returned, in padded form."""

    value: Tensor
    stats: dict[str, Tensor]
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]
    parts: dict[str, dict[str, Tensor]]


def operate(problem: Problem, backend: str | None = None) -> Found:
    """The problem through its operation, under another default dtype and device."""
    dtype, device = problem.ambient
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # entered only where it says something: each call of torch passes through it
        with torch.device(device) if device != "cpu" else nullcontext():
            return _operate(problem, backend)
    finally:
        torch.set_default_dtype(before)


def _operate(problem: Problem, backend: str | None) -> Found:
    form = _Form(problem)
    leaves = {
        name: (form.pack(t) if name == "hidden" else t).detach().requires_grad_(name not in problem.frozen)
        for name, t in problem.tensors().items()
    }
    labels = form.pack(problem.labels)
    side_inputs = {name: form.side_input(name, value) for name, value in problem.side_inputs.items()}
    temperature = form.side_input("temperature", problem.temperature)
    transform = {"temperature": temperature, "softcap": problem.softcap, "logit_scale": problem.logit_scale}
    call: dict[str, Any] = {**side_inputs, **problem.normalisers, "split": problem.split}
    if form.bounds is not None:
        call["cu_seqlens"] = form.bounds
    plan = {}
    if problem.layout == "static":
        plan = {"plan": static_plan(labels, False)}
    elif problem.planned:
        plan = {"plan": make_plan(labels, cu_seqlens=form.bounds)}
    head = {"bias": leaves.get("bias"), "vocab_size": problem.vocab_size, "scratch_bytes": problem.scratch_bytes}
    hidden, weight, loss = leaves["hidden"], leaves["weight"], problem.loss
    if problem.route == "linear_loss":
        asked = () if problem.seed % 3 else STATISTICS
        out = linear_loss(
            hidden,
            weight,
            labels,
            loss,
            **transform,
            **head,
            **call,
            **plan,
            split_gradients=problem.split_gradients,
            outputs=asked,
            backend=backend,
        )
    elif problem.route == "linear_token_stats":
        # it knows no sequences
        alone = {} if form.bounds is not None else plan
        stats = linear_token_stats(
            hidden, weight, labels, **transform, **head, **alone, outputs=STATISTICS, backend=backend
        )
        out = stats_loss(stats, labels, loss, **call, **plan)
    else:
        logits = hidden @ weight.to(hidden.dtype).t()
        logits = logits if "bias" not in leaves else logits + leaves["bias"].to(hidden.dtype)
        stats = token_stats(logits[..., : problem.classes], labels, **transform, outputs=STATISTICS, backend=backend)
        out = stats_loss(stats, labels, loss, **call, **plan)
    gradients = {}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted:
        got = torch.autograd.grad(out.loss, list(wanted.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(wanted, got, strict=True) if g is not None}
    if "hidden" in gradients:
        gradients["hidden"] = form.unpack(gradients["hidden"])
    parts: dict[str, dict[str, Tensor]] = {}
    if out.split_gradients is not None:
        parts = {name: dict(getattr(out.split_gradients, name)) for name in ("hidden", "weight", "bias")}
        parts["hidden"] = {name: form.unpack(g) for name, g in parts["hidden"].items()}
    stats_found = {name: form.unpack(v) for name, v in out.stats.present().items()}
    return Found(out.loss.detach(), stats_found, out.metrics, gradients, parts)


class _Form:
    """From the padded form of a problem to that of its call, and back."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        count = torch.tensor(problem.rows, device="cpu")
        packed = problem.layout == "packed"
        length = problem.labels.shape[1]
        self.kept = torch.arange(length, device="cpu") < count.unsqueeze(1) if packed else None  # (B, S)
        self.bounds = torch.nn.functional.pad(count.cumsum(0), (1, 0)) if packed else None

    def pack(self, values: Tensor) -> Tensor:
        return values if self.kept is None else values[self.kept]

    def unpack(self, values: Tensor) -> Tensor:
        if self.kept is None:
            return values
        out = values.new_zeros((*self.kept.shape, *values.shape[1:]))
        out[self.kept] = values
        return out

    def side_input(self, name: str, value: Any) -> Any:
        if self.kept is None or not isinstance(value, Tensor) or value.ndim == 0:
            return value
        per_token = value.ndim == 2
        value = self.pack(value) if per_token else value
        if int(self.kept.sum()) != self.kept.shape[0] or value.dtype == torch.bool:
            return value
        # as many tokens as sequences: said by the shape
        return value.unsqueeze(0) if per_token else value.unsqueeze(1)
