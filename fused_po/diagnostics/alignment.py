"""The G diagnostic: whether a step on a loss makes the final model's responses more likely.

``G(L; theta) = <grad E_{D'}[-log pi(y'|x'; theta)], grad L(D; theta)>`` with D' the responses of the final model
("What Is Preference Optimization Doing, How and Why?", arXiv 2512.00778): steadily positive where the targets are
stable, near 0 or changing sign where the loss explores. G is linear in L, so the parts of a loss sum to the whole, and
to first order a step theta - eta grad L changes the mean NLL of D' by -eta G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.kernels.contract import Coefficients
from fused_po.losses.contract import Batch, Loss
from fused_po.ops.batches import Layout, call_batch, masked_stats
from fused_po.ops.coefficients import coefficients
from fused_po.ops.output import THIRDS, parts_of
from fused_po.ops.planning import make_plan
from fused_po.splits import Split
from fused_po.stats import Stats
from fused_po.trainers.model import token_stats_of

__all__ = ["PARTS", "Alignment", "Examples", "by_layer", "gradient_alignment"]

PARTS = ("whole", "positive", "negative", "rest", "top", "middle", "bottom")
FLAT = "/no_reweighting"
# length of a directional step over the length of the parameters
STEPS = {torch.float64: 1e-5, torch.float32: 1e-3}

StatsOf = Callable[[nn.Module, Mapping[str, Any], Tensor, Sequence[str]], Stats]


@dataclass(frozen=True)
class Examples:
    """A batch of D or of D'.

    Attributes:
        inputs: what the model takes; (B, S) each for a causal language model.
        labels: (B, S - 1) for a causal language model: already shifted, -100 ignored. Pairs: first half chosen.
        side_inputs: what the loss reads, as in ``linear_loss``.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    side_inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Alignment:
    """G of each part of a loss, by block of parameters.

    Attributes:
        values: part -> block -> G. Parts are ``PARTS`` and, with the loss's own weights replaced by their mean over the
            batch, the same with "/no_reweighting" behind them. whole = positive + negative + rest = top + middle +
            bottom + rest; the rest are terms and tokens without a side.
    """

    values: Mapping[str, Mapping[str, float]]

    def __getitem__(self, part: str) -> float:
        """G of a part over all parameters."""
        return sum(self.values[part].values())


def by_layer(name: str) -> str:
    """Blocks of a transformer: the part of a parameter's name up to the number of its layer, else its first module."""
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[max(0, place - 1) : place + 1])
    return words[-2] if len(words) > 1 else name


def gradient_alignment(
    model: nn.Module,
    batches: Sequence[Examples],
    loss: Loss,
    target: Sequence[Examples],
    *,
    method: str = "directional",
    reduction: str = "sequence",
    blocks: Callable[[str], str] | None = None,
    step: float | None = None,
    stats: StatsOf = token_stats_of,
) -> Alignment:
    """G of a loss and of its parts at the model's parameters, which are left as they were, gradients included.

    Args:
        model: any module; its parameters that require a gradient count. Put it into eval mode for G without dropout.
        batches: D; the loss is the mean over the batches. Means and thirds of weights are those of each batch.
        loss: from ``fused_po.losses.create``.
        target: D', responses of the final model; side inputs are not read.
        method: ``exact``, inner products of gradients, a forward and backward for each part; or ``directional``, the
            change of all log-probs along the gradient of D', two forwards for all parts together.
        reduction: of the NLL over D': ``sequence``, the mean over responses of their sums (the definition), or
            ``token``, the mean over tokens.
        blocks: from a parameter's name to its block (``by_layer``); None: all in one, "all". ``directional`` takes
            two forwards for each block.
        step: length of a directional step over that of the block's parameters; default 1e-5 in float64, 1e-3 else.
        stats: ``stats(model, inputs, labels, outputs)``, differentiable statistics in the shape of labels; default
            for causal language models of transformers.

    Raises:
        ValueError: D' or D without a loss token, a label beyond the model's vocabulary (D' of another tokenizer), an
            unknown method or reduction, a model without trainable parameters.
    """
    for name, value, known in (
        ("method", method, ("exact", "directional")),
        ("reduction", reduction, ("sequence", "token")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if step is not None and not step > 0:
        raise ValueError(f"step must be above 0: got {step}")
    for name, given in (("target (D')", target), ("batches (D)", batches)):
        if not any(bool((examples.labels >= 0).any()) for examples in given):
            raise ValueError(f"{name} holds no loss token")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient")
    block_of = {name: "all" if blocks is None else blocks(name) for name in parameters}
    direction = _target_gradient(model, parameters, target, reduction, stats)
    run = _Run(model, parameters, block_of, direction, loss, stats, step)
    totals: dict[str, dict[str, float]] = {}
    for examples in batches:
        found = run.exact(examples) if method == "exact" else run.directional(examples)
        for part, per_block in found.items():
            into = totals.setdefault(part, dict.fromkeys(per_block, 0.0))
            for block, alignment in per_block.items():
                into[block] += alignment / len(batches)
    return Alignment(totals)


def _target_gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], target: Sequence[Examples], reduction: str, stats: StatsOf
) -> dict[str, Tensor]:
    """The gradient of the mean NLL of D'."""
    labels = [examples.labels for examples in target]
    counted = (one >= 0 if reduction == "token" else (one >= 0).any(-1) for one in labels)
    count = sum(int(one.sum()) for one in counted)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for examples in target:
        try:
            logp = stats(model, examples.inputs, examples.labels, ("logp",)).logp
        except (ValueError, IndexError) as error:
            raise ValueError(f"D' does not fit the model (another tokenizer?): {error}") from error
        assert logp is not None
        kept = torch.where(examples.labels >= 0, logp, 0.0)
        for name, grad in _gradients(-kept.sum() / count, parameters).items():
            total[name] += grad
    return total


@dataclass(frozen=True)
class _Run:
    """Both estimators; the slopes of statistics and the gradients of parameters are taken along ``direction``."""

    model: nn.Module
    parameters: Mapping[str, Tensor]
    block_of: Mapping[str, str]
    direction: Mapping[str, Tensor]
    loss: Loss
    stats: StatsOf
    step: float | None

    def exact(self, examples: Examples) -> dict[str, dict[str, float]]:
        """part -> block -> G, by the inner products of gradients."""
        layout, parts = _coefficients(self.model, examples, self.loss, self.stats)
        found: dict[str, dict[str, float]] = {}
        for part, triple in parts.items():
            given = self.stats(self.model, examples.inputs, examples.labels, self.loss.statistics)
            gradients = _gradients(_weighted(given, triple, layout), self.parameters)
            found[part] = dict.fromkeys(self.block_of.values(), 0.0)
            for name, grad in gradients.items():
                found[part][self.block_of[name]] += (grad.double() * self.direction[name].double()).sum().item()
        return found

    def directional(self, examples: Examples) -> dict[str, dict[str, float]]:
        """part -> block -> G, by the slopes of the statistics."""
        layout, parts = _coefficients(self.model, examples, self.loss, self.stats)
        found: dict[str, dict[str, float]] = {part: {} for part in parts}
        for block in dict.fromkeys(self.block_of.values()):
            slopes = self._slopes(examples, block)
            for part, triple in parts.items():
                found[part][block] = 0.0 if slopes is None else _weighted(slopes, triple, layout).item()
        return found

    def _slopes(self, examples: Examples, block: str) -> Stats | None:
        """Of the statistics along the direction within one block; None where that is 0."""
        own = {name: along for name, along in self.direction.items() if self.block_of[name] == block}
        length = _norm(own.values())
        if length == 0.0:
            return None
        relative = self.step or STEPS.get(next(iter(own.values())).dtype, STEPS[torch.float32])
        size = relative * (_norm(self.parameters[name] for name in own) or 1.0) / length
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad(), _moved(self.parameters, own, sign * size):
                ends.append(self.stats(self.model, examples.inputs, examples.labels, self.loss.statistics))
        ahead, behind = (end.present() for end in ends)
        through = self.loss.differentiates
        return Stats(**{name: (ahead[name].double() - behind[name].double()) / (2 * size) for name in through})


def _coefficients(
    model: nn.Module, examples: Examples, loss: Loss, stats: StatsOf
) -> tuple[Layout, dict[str, Coefficients]]:
    """The coefficients of each part at the model's parameters."""
    loss.check(frozenset(examples.side_inputs))
    layout = Layout.of(examples.labels, make_plan(examples.labels))
    with torch.no_grad():
        given = stats(model, examples.inputs, examples.labels, loss.statistics)
        packed = Stats(**{name: layout.rows.gather(v.reshape(-1)) for name, v in given.present().items()})
        packed = masked_stats(packed, layout.mask)
        assert packed.logp is not None
        batch = call_batch(layout, examples.side_inputs, None, None, packed.logp.dtype)
        thirds = parts_of(THIRDS, loss, packed, batch)
        found = _parts("", loss, packed, batch, thirds, "identity")
        return layout, found | _parts(FLAT, loss, packed, batch, thirds, "none")


def _parts(
    suffix: str, loss: Loss, stats: Stats, batch: Batch, thirds: Tensor, reweight: str
) -> dict[str, Coefficients]:
    def under(positive: float, negative: float) -> Coefficients:
        split = Split(positive, negative, reweight=reweight, population="batch")
        return coefficients(loss, stats, batch, split)[1]

    whole, rest = under(1.0, 1.0), under(0.0, 0.0)
    assert whole.logp is not None and rest.logp is not None
    sided = whole.logp - rest.logp
    found = {"whole": whole, "rest": rest}
    for name, split in (("positive", (1.0, 0.0)), ("negative", (0.0, 1.0))):
        c = under(*split).logp
        assert c is not None
        found[name] = Coefficients(c - rest.logp)
    for index, name in enumerate(THIRDS[:3]):
        found[name] = Coefficients(torch.where(thirds == index, sided, 0.0))
    return {f"{name}{suffix}": found[name] for name in PARTS}


def _weighted(given: Stats, triple: Coefficients, layout: Layout) -> Tensor:
    """The coefficients times the statistics, (): what has the part's gradient."""
    total: Tensor | None = None
    for name, c in zip(("logp", "entropy", "lse"), triple, strict=True):
        if c is not None:
            values = layout.rows.gather(getattr(given, name).reshape(-1))
            term = (c.double() * values.double()).sum()
            total = term if total is None else total + term
    assert total is not None
    return total


def _gradients(value: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs}


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(t.detach().double().square().sum().item() for t in tensors) ** 0.5


@contextmanager
def _moved(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], size: float) -> Iterator[None]:
    """The parameters moved along a direction, and afterwards back to the bit."""
    before = {name: parameters[name].detach().clone() for name in direction}
    try:
        for name, along in direction.items():
            parameters[name].data.add_(along, alpha=size)
        yield
    finally:
        for name, saved in before.items():
            parameters[name].data.copy_(saved)
