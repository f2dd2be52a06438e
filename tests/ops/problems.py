"""Small float64 problems for the operations, with everything switched on, and the routes through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_po import losses
from fused_po.losses.batch import Batch
from fused_po.losses.terms import choose, policy_logp
from fused_po.ops.plain import plain_loss, plain_stats
from fused_po.stats import Stats
from tests.losses.cases import side_inputs

B, S, H, V = 6, 9, 16, 37


@dataclass(frozen=True)
class EntropyPairs(losses.Loss):
    """Reads and differentiates everything, pair by pair, with no pattern: the hardest case for the planner."""

    name = "entropy-pairs"

    @property
    def horizon(self) -> str:
        return "pair"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logp", "entropy", "lse", "log_sum_sq_probs"})

    @property
    def differentiates(self) -> tuple[str, ...]:
        return ("logp", "entropy", "lse")

    def role(self, batch: Batch) -> Tensor:
        return choose(batch.chosen, 1.0, -1.0)

    def __call__(self, stats: Stats, batch: Batch) -> dict[str, Tensor]:
        weight = batch.spread(batch.mean_per_sequence(stats.log_sum_sq_probs.detach()).exp())
        score = batch.sum_per_sequence(weight * policy_logp(stats) + stats.entropy.sin() + 0.1 * stats.lse.square())
        chosen, rejected = batch.halves(score)
        return {"preference": batch.mean_pairs(torch.sigmoid(0.1 * (rejected - chosen)))}


@dataclass
class Problem:
    """One call of ``linear_loss``; ``frozen`` names what does not require a gradient."""

    loss: losses.Loss
    frozen: frozenset[str] = frozenset()
    softcap: float | None = 15.0
    batch: int = B
    length: int = S
    dtype: torch.dtype = torch.float64
    masked: float = 0.3
    seed: int = 0
    tensors: dict[str, Tensor] = field(init=False)
    labels: Tensor = field(init=False)
    temperature: Tensor = field(init=False)
    side_inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        shapes = {"hidden": (self.batch, self.length, H), "weight": (V, H), "bias": (V,)}
        self.tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.labels = torch.randint(0, V, (self.batch, self.length))
        self.labels[torch.rand(self.labels.shape) < self.masked] = -100
        self.temperature = torch.rand(self.labels.shape, dtype=torch.float64) + 0.5
        logp = self.stats().logp.detach()
        self.side_inputs = side_inputs(self.loss, self.labels, logp)
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.to(self.dtype).requires_grad_(name not in self.frozen)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.requires_grad]

    @property
    def transform(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "softcap": self.softcap, "logit_scale": 1.3}

    def logits(self) -> Tensor:
        return self.tensors["hidden"] @ self.tensors["weight"].t() + self.tensors["bias"]

    def stats(self) -> Stats:
        return plain_stats(self.logits(), self.labels, **self.transform)

    def plain(self) -> Tensor:
        return plain_loss(self.logits(), self.labels, self.loss, **self.transform, **self.side_inputs)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["hidden"], self.tensors["weight"], self.labels

    def options(self) -> dict[str, Any]:
        return {"bias": self.tensors["bias"], **self.transform}


class CountGemms(TorchDispatchMode):
    """Counts the FLOP of matrix products, in units of one GEMM of the head over the loss tokens of ``labels``."""

    def __init__(self, labels: Tensor, vocab: int = V, width: int = H) -> None:
        super().__init__()
        self.unit = int((labels >= 0).sum()) * vocab * width
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))

    @property
    def gemms(self) -> float:
        return self.products / self.unit


def words(names: frozenset[str]) -> str:
    """Of a set as a parameter: its order differs from process to process."""
    return "-".join(sorted(names)) or "none"


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, and ||got|| where want is exactly 0."""
    norm = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (norm or 1.0)
