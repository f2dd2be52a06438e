"""Cases, problems and the accuracy rule, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_po.kernels import library
from fused_po.kernels.contract import Coefficients, Span, Transform, accumulation_dtype, finish
from fused_po.ops.plain import plain_stats

__all__ = ["CASES", "Check", "KernelCase", "KernelProblem", "accuracy", "assert_accurate", "self_test"]


@dataclass(frozen=True)
class KernelProblem:
    """Raw head outputs with labels.

    Attributes:
        x: (N, V).
        labels: (N,) int64.
        transform: logit transform.
        vocab_size: classes; further columns of ``x`` are padding.
    """

    x: Tensor  # (N, V)
    labels: Tensor  # (N,)
    transform: Transform
    vocab_size: int


@dataclass(frozen=True)
class KernelCase:
    """A named family of rows; ``make`` builds it in any dtype on any device, from a seed.

    Attributes:
        rows, vocab: N and V.
        std: of the logits; real heads have 2 to 4.
        peak: added to the target's logit. 12 leaves most rows with p_y > 0.5, as trained models have.
        change: edits x (N, V) and labels (N,) in place.
    """

    rows: int
    vocab: int
    std: float = 3.0
    peak: float = 0.0
    temperature: float = 1.0
    row_temperatures: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    padding: int = 0
    change: Callable[[Tensor, Tensor], object] | None = None

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> KernelProblem:
        generator = torch.Generator().manual_seed(seed)
        x = self.std * torch.randn(self.rows, self.vocab + self.padding, generator=generator)
        labels = torch.randint(0, self.vocab, (self.rows,), generator=generator)
        if self.rows:
            x[torch.arange(self.rows), labels] += self.peak
        if self.change is not None:
            self.change(x, labels)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        temperatures = torch.rand(self.rows, generator=generator).add_(0.5).to(device, wide)
        transform = Transform(
            self.temperature, temperatures if self.row_temperatures else None, self.softcap, self.logit_scale
        )
        return KernelProblem(x.to(device, dtype), labels.to(device), transform, self.vocab)


def _ends(x: Tensor, labels: Tensor) -> None:
    labels[0::2], labels[1::2] = 0, x.shape[1] - 1


def _masked_classes(x: Tensor, labels: Tensor) -> None:
    """-inf at most classes, the first block of a row among them, but not at the target."""
    kept = x.gather(1, labels.unsqueeze(1))
    x[:, : x.shape[1] * 3 // 4] = -torch.inf
    x.scatter_(1, labels.unsqueeze(1), kept)


CASES: dict[str, KernelCase] = {
    "flat": KernelCase(5, 300, std=0.5),
    "usual": KernelCase(7, 1000),
    "peaked": KernelCase(6, 500, peak=18.0),
    "certain": KernelCase(4, 200, peak=60.0),
    "power of two": KernelCase(3, 4096),
    "longer than a block": KernelCase(2, 9001),
    "one class": KernelCase(3, 1),
    "two classes": KernelCase(4, 2),
    "one row": KernelCase(1, 257),
    "no row": KernelCase(0, 64),
    "first and last class": KernelCase(6, 130, change=_ends),
    "plus and minus 1e4": KernelCase(16, 200, change=lambda x, _: x.copy_(x.sign() * 1e4 + x.round())),
    "all strongly negative": KernelCase(4, 5000, change=lambda x, _: x.sub_(1e4)),
    "all strongly positive": KernelCase(4, 300, change=lambda x, _: x.add_(1e4)),
    "masked classes": KernelCase(4, 6000, change=_masked_classes),
    "temperature": KernelCase(5, 300, temperature=0.7),
    "row temperatures": KernelCase(5, 300, row_temperatures=True),
    "softcap": KernelCase(5, 300, std=20.0, softcap=15.0),
    "small softcapped": KernelCase(5, 300, std=0.05, softcap=30.0),
    "everything": KernelCase(5, 700, row_temperatures=True, softcap=20.0, logit_scale=1.5, padding=9),
}


def accuracy(got: Tensor, naive: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error and its bound: twice that of naive PyTorch in the same dtype, plus an ulp of the output's
    scale.
    """
    if got.numel() == 0:
        return 0.0, 0.0
    finite = truth.isfinite()
    want = truth[finite].double()
    if want.numel() == 0:
        return 0.0, 0.0
    error = (got[finite].double() - want).abs().amax().item()
    naive_error = (naive[finite].double() - want).abs().nan_to_num(0.0, 0.0).amax().item()
    return error, 2.0 * naive_error + torch.finfo(got.dtype).eps * want.abs().amax().item()


def assert_accurate(got: Tensor, naive: Tensor, truth: Tensor, what: str = "result") -> None:
    """Hold a result to the accuracy rule.

    Args:
        got: the result.
        naive: the same from plain PyTorch in the same dtype.
        truth: the same in float64; infinities must agree exactly, NaN with NaN.
        what: named in the failure.

    Raises:
        AssertionError: shapes or infinities differ, or the error is over its bound.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(truth.shape)}"
    odd = ~truth.isfinite()
    same = torch.equal(got[odd].double().nan_to_num(nan=-1.0), truth[odd].double().nan_to_num(nan=-1.0))
    assert same and bool(got[~odd].isfinite().all()), f"{what}: infinities or NaN differ"
    error, bound = accuracy(got, naive, truth)
    assert error <= bound, f"{what}: error {error:.3g} over its bound {bound:.3g}"


@dataclass(frozen=True)
class Check:
    """One result of a backend: its largest error to float64, and the bound of the accuracy rule."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def self_test(backend: str, device: torch.device | str) -> list[Check]:
    """Hold the three kernels of a backend to the accuracy rule on a few small cases.

    Args:
        backend: a name from ``fused_po.kernels.select.BACKENDS``.
        device: where to run.

    Raises:
        ValueError: the backend can't run there.
    """
    checks = []
    for case, dtype in (
        ("usual", torch.float32),
        ("everything", torch.float32),
        ("longer than a block", torch.bfloat16),
    ):
        problem = CASES[case].make(dtype, device)
        got = _by_kernels(problem, backend)
        naive, truth = _by_autograd(problem, accumulation_dtype(dtype)), _by_autograd(problem, torch.float64)
        name = f"{case}, {str(dtype).removeprefix('torch.')}"
        for key, value in got.items():
            checks.append(Check(f"{key} ({name})", *accuracy(value, naive[key].to(value.dtype), truth[key])))
    return checks


def _by_kernels(problem: KernelProblem, backend: str) -> dict[str, Tensor]:
    x, labels, transform, span = problem.x, problem.labels, problem.transform, Span(0, problem.vocab_size)
    outputs = ("logp", "entropy", "lse")
    partials = library.row_stats(x, labels, transform, span, outputs, backend)
    stats, anchors = finish(partials, labels, problem.vocab_size, outputs)
    tile, gradient = (torch.full_like(x, torch.nan) for _ in range(2))
    library.row_softmax(x, labels, transform, span, outputs, tile, backend)
    ones = torch.ones_like(stats.present()["logp"])
    library.row_grad(x, labels, transform, span, anchors, Coefficients(ones, ones, ones), gradient, backend)
    return stats.present() | {"tile": tile[:, : span.stop], "gradient": gradient[:, : span.stop]}


def _by_autograd(problem: KernelProblem, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the textbook."""
    leaf = problem.x[:, : problem.vocab_size].detach().to(dtype).requires_grad_()
    transform = problem.transform
    temperature = transform.temperature if transform.temperatures is None else transform.temperatures.to(dtype)
    with torch.enable_grad():
        stats = plain_stats(
            leaf,
            problem.labels,
            temperature=temperature,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
            outputs=("logp", "entropy", "lse"),
        ).present()
        (tile,) = torch.autograd.grad(stats["logp"].sum(), leaf, retain_graph=True)
        (gradient,) = torch.autograd.grad(torch.stack(list(stats.values())).sum(), leaf)
    return {name: value.detach() for name, value in stats.items()} | {"tile": tile, "gradient": gradient}
