"""From logits that are there to log-probs, entropies or the gradient tile: cases, ways and the peers installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from fused_po.bench.accuracy import Results, allowed, errors
from fused_po.bench.cases import LEAD, PEAKED, SPREAD
from fused_po.bench.methods import refusal
from fused_po.kernels import library
from fused_po.kernels.contract import Span, Transform, finish
from fused_po.kernels.select import BACKENDS

# rows whose results are compared
SAMPLE = 64


@dataclass(frozen=True)
class RowCase:
    """N rows of V logits, all of which carry loss.

    Wrong classes are normal with standard deviation ``SPREAD``. "peaked" raises the label of a random ``PEAKED`` of the
    rows to ``LEAD`` above the log-sum-exp of the others, a probability of 0.88; "flat" leaves it where it is.
    ``what`` is asked for: "logp" and "logp+entropy" read the logits once, "tile" reads them and writes
    d logp / dx = 1[v = y] - p in the dtype ``out``.
    """

    rows: int
    vocab: int
    what: str
    dtype: torch.dtype = torch.bfloat16
    kind: str = "peaked"

    @property
    def name(self) -> str:
        return f"{self.what}-N{self.rows}-V{self.vocab}-{self.kind}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def out(self) -> torch.dtype:
        """Whatever the logits are in, a tile feeds matrix products in bfloat16."""
        return torch.bfloat16

    @property
    def traffic(self) -> int:
        """Bytes that are read and written at least."""
        elements = self.rows * self.vocab
        return elements * (self.dtype.itemsize + (self.out.itemsize if self.what == "tile" else 0))


class RowProblem:
    """The tensors of a case."""

    def __init__(self, case: RowCase, device: str, seed: int = 0) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.rows, case.vocab)
        self.x = torch.empty(shape, dtype=case.dtype, device=device)  # (N, V)
        self.labels = torch.randint(case.vocab, (case.rows,), generator=generator, device=device)
        lead = math.log(case.vocab) + SPREAD**2 / 2 + LEAD
        peaked = torch.rand(case.rows, generator=generator, device=device) < PEAKED
        # a block at a time: float32 next to all logits would not fit
        for first in range(0, case.rows, 1024):
            block = slice(first, first + 1024)
            z = torch.randn(self.x[block].shape, generator=generator, device=device).mul_(SPREAD)
            if case.kind == "peaked":
                raised = torch.where(peaked[block], lead, z.gather(1, self.labels[block, None]).squeeze(1))
                z.scatter_(1, self.labels[block, None], raised.unsqueeze(1))
            self.x[block] = z
        self.tile = torch.empty(shape, dtype=case.out, device=device) if case.what == "tile" else None
        self.rows = torch.randperm(case.rows, generator=torch.Generator().manual_seed(1))[:SAMPLE].to(device)

    def bounds(self) -> tuple[Results, dict[str, float]]:
        """The sample by the textbook in float64, and the largest error that is accepted of each of its results."""
        x, labels, case = self.x[self.rows], self.labels[self.rows], self.case
        truth = textbook(x, labels, case.what, torch.float64, torch.float64)
        naive = textbook(x, labels, case.what, case.out)
        return truth, allowed(errors(naive, truth), {name: naive[name].dtype for name in naive})

    def poison(self) -> None:
        """Before results are judged: the tile of the way before would do for one that writes nothing."""
        if self.tile is not None:
            self.tile.fill_(math.nan)

    def sample(self, results: Results) -> Results:
        return {name: value[self.rows] for name, value in results.items()}


# each call gives the results of all rows
Way = Callable[[RowProblem], Results]


def by_kernels(problem: RowProblem, backend: str, finished: bool = True) -> Results:
    """This project's; not ``finished``, the kernel alone without the O(N) arithmetic on its partials."""
    x, labels, case = problem.x, problem.labels, problem.case
    outputs = ("logp", "entropy") if case.what == "logp+entropy" else ("logp",)
    arguments = (x, labels, Transform(), Span(0, case.vocab), outputs)
    if problem.tile is None:
        partials = library.row_stats(*arguments, backend)
    else:
        partials = library.row_softmax(*arguments, problem.tile, backend)
    if not finished:
        return {}
    found = finish(partials, labels, case.vocab, outputs)[0].present()
    return found if problem.tile is None else found | {"tile": problem.tile}


def by_torch(function: Callable[..., Results], problem: RowProblem) -> Results:
    return function(problem.x, problem.labels, problem.case.what, problem.case.out)


def textbook(x: Tensor, labels: Tensor, what: str, out: torch.dtype, wide: torch.dtype = torch.float32) -> Results:
    """Plain torch, softmax in ``wide``."""
    log_p = torch.log_softmax(x, -1, dtype=wide)
    found = {"logp": log_p.gather(1, labels.unsqueeze(1)).squeeze(1)}
    if what == "logp+entropy":
        found["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if what == "tile":
        classes = torch.arange(x.shape[1], device=x.device)
        found["tile"] = ((classes == labels.unsqueeze(1)).to(wide) - log_p.exp()).to(out)
    return found


def by_trl(problem: RowProblem) -> Results:
    utils = import_module("trl.trainer.utils")
    if problem.case.what == "logp":
        return {"logp": utils.selective_log_softmax(problem.x, problem.labels)}
    logp, entropy = utils.selective_log_softmax_and_entropy(problem.x, problem.labels, entropy_requires_grad=False)
    return {"logp": logp, "entropy": entropy}


def liger(problem: RowProblem) -> Way:
    """Cross entropy, and its gradient over the logits: in a copy, since the others still need them."""
    apply = import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction.apply
    copy = problem.x.clone().requires_grad_(problem.case.what == "tile")

    def way(problem: RowProblem) -> Results:
        loss = apply(copy, problem.labels, None, -100, 0.0, 0.0, "none")[0]
        found = {"logp": loss.detach().neg()}
        # the sign of a loss
        return found if problem.case.what == "logp" else found | {"tile": copy.detach()}

    return way


def quack(problem: RowProblem) -> Way:
    forward = import_module("quack.cross_entropy").cross_entropy_fwd

    def way(problem: RowProblem) -> Results:
        if problem.case.what == "logp":
            return {"logp": forward(problem.x, problem.labels)}
        loss, tile = forward(problem.x, problem.labels, return_dx=True)
        return {"logp": loss, "tile": tile}

    return way


# they give the negative of what is asked; turning that would be charged to them
NEGATIVE = {"quack": ("logp", "tile"), "liger": ("tile",)}


def competitors(problem: RowProblem, device: str) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that run here, ours first, and why the others do not."""
    ways: dict[str, Way] = {}
    absent = {}
    for name in BACKENDS:
        reason = refusal(name, "row_stats", problem.x)
        if reason is not None:
            absent[name] = reason
            continue
        ways[name] = partial(by_kernels, backend=name)
        if name != "reference":
            ways[f"{name} kernel"] = partial(by_kernels, backend=name, finished=False)
    ways["torch"] = partial(by_torch, textbook)
    if device == "cuda":
        ways["torch.compile"] = partial(by_torch, torch.compile(textbook, dynamic=False))
    else:
        absent["torch.compile"] = "timed on a GPU only: compiling takes longer than a short run"
    if problem.case.what == "tile":
        absent["trl"] = "has no such function"
    else:
        ways["trl"] = by_trl
    for name, make in {"liger": liger, "quack": quack}.items():
        if problem.case.what == "logp+entropy":
            absent[name] = "gives no entropy"
            continue
        if device != "cuda":
            absent[name] = "needs a GPU"
            continue
        try:
            ways[name] = make(problem)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"
    return ways, absent
