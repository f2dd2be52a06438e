"""The G diagnostic: whether a step on a loss makes the final model's responses more likely.

``G(L; theta) = <grad E_{D'}[-log pi(y'|x'; theta)], grad L(D; theta)>`` with D' the responses of the final model
("What Is Preference Optimization Doing, How and Why?", arXiv 2512.00778): steadily positive where the targets are
stable, near 0 or changing sign where the loss explores. G is linear in L, so the parts of a loss sum to the whole, and
to first order a step theta - eta grad L changes the mean NLL of D' by -eta G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_po.diagnostics.parts import (
    Examples,
    StatsOf,
    accumulators,
    gradients,
    norm,
    require_loss_tokens,
    take_apart,
)
from fused_po.losses.contract import Loss, Named
from fused_po.stats import Stats
from fused_po.trainers.model import token_stats_of

__all__ = ["Alignment", "by_layer", "gradient_alignment"]

# length of a directional step over the length of the parameters
STEPS = {torch.float64: 1e-5, torch.float32: 1e-3}


@dataclass(frozen=True)
class Alignment:
    """G of each part of a loss, by block of parameters.

    Attributes:
        values: part -> block -> G. Parts are ``whole``; ``positive`` and ``negative``, its sides; ``top``, ``middle``
            and ``bottom``, the thirds of the tokens with a side by the loss's own weight; and ``rest``, terms and
            tokens without a side. whole = positive + negative + rest = top + middle + bottom + rest. Each stands there
            a second time with "/no_reweighting" behind its name: with all weights replaced by their mean over the
            batch.
    """

    values: Mapping[str, Mapping[str, float]]

    def __getitem__(self, part: str) -> float:
        """G of a part over all parameters.

        Raises:
            KeyError: an unknown part; or a block, whose G stands in ``values``.
        """
        if part not in self.values and any(part in blocks for blocks in self.values.values()):
            raise KeyError(
                f"{part!r} is a block and not a part: values[PART][{part!r}] is its G, PART being 'whole', ..."
            )
        return sum(self.values[part].values())


def by_layer(name: str) -> str:
    """Blocks of a transformer: the part of a parameter's name up to the number of its layer, else its first module."""
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[max(0, place - 1) : place + 1])
    return words[-2] if len(words) > 1 else name


@torch.enable_grad()
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
    """G: the inner product of two gradients at the model's parameters, that of a loss (or of a part of it) on examples
    D, and that of the negative log-likelihood of D', responses of the final model. Above 0: a step on the loss makes
    these responses more likely. The model is left as it was, gradients included.

    Args:
        model: any module; its parameters that require a gradient count. Put it into eval mode for G without dropout.
        batches: D; the loss is the mean over the batches. Means and thirds of weights are those of each batch.
        loss: from ``fused_po.losses.create``.
        target: D'; side inputs are not read.
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
        ValueError: D' or D that is no list of ``Examples`` or holds no loss token, ``blocks`` that is no function, a
            label beyond the model's vocabulary (D' of another tokenizer), an unknown method or reduction, a model
            without trainable parameters.
    """
    for name, value, known in (
        ("method", method, ("exact", "directional")),
        ("reduction", reduction, ("sequence", "token")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if step is not None and not step > 0:
        raise ValueError(f"step must be above 0: got {step}")
    if blocks is not None and not callable(blocks):
        raise ValueError(
            "blocks must be a function from a parameter's name to its block, such as fused_po.diagnostics.by_layer "
            f"(the function, not its name): got {blocks!r}"
        )
    for name, given in (("target (D')", target), ("batches (D)", batches)):
        require_loss_tokens(name, given)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient")
    halves = [name for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if method == "directional" and halves:
        raise ValueError(
            f"directional needs parameters of 32 bits or more, a small step is lost in {halves[0]}: exact does not"
        )
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
    return Alignment(Named("part", {part: Named("block", per_block) for part, per_block in totals.items()}))


def _target_gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], target: Sequence[Examples], reduction: str, stats: StatsOf
) -> dict[str, Tensor]:
    """The gradient of the mean NLL of D'."""
    labels = [examples.labels for examples in target]
    counted = (one >= 0 if reduction == "token" else (one >= 0).any(-1) for one in labels)
    count = sum(int(one.sum()) for one in counted)
    total = accumulators(parameters)
    for examples in target:
        try:
            logp = stats(model, examples.inputs, examples.labels, ("logp",)).logp
        except (ValueError, IndexError) as error:
            raise ValueError(f"D' does not fit the model (another tokenizer?): {error}") from error
        assert logp is not None
        kept = torch.where(examples.labels >= 0, logp, 0.0)
        for name, grad in gradients(-kept.sum() / count, parameters).items():
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
        taken = take_apart(self.model, examples, self.loss, self.stats)
        found: dict[str, dict[str, float]] = {}
        for part in taken.parts:
            given = self.stats(self.model, examples.inputs, examples.labels, self.loss.statistics)
            of_part = gradients(taken.weighted(given, part), self.parameters)
            found[part] = dict.fromkeys(self.block_of.values(), 0.0)
            for name, grad in of_part.items():
                found[part][self.block_of[name]] += (grad.double() * self.direction[name].double()).sum().item()
        return found

    def directional(self, examples: Examples) -> dict[str, dict[str, float]]:
        """part -> block -> G, by the slopes of the statistics."""
        taken = take_apart(self.model, examples, self.loss, self.stats)
        found: dict[str, dict[str, float]] = {part: {} for part in taken.parts}
        for block in dict.fromkeys(self.block_of.values()):
            slopes = self._slopes(examples, block)
            for part in taken.parts:
                found[part][block] = 0.0 if slopes is None else taken.weighted(slopes, part).item()
        return found

    def _slopes(self, examples: Examples, block: str) -> Stats | None:
        """Of the statistics along the direction within one block; None where that is 0."""
        own = {name: along for name, along in self.direction.items() if self.block_of[name] == block}
        length = norm(own.values())
        if length == 0.0:
            return None
        relative = self.step or STEPS.get(next(iter(own.values())).dtype, STEPS[torch.float32])
        size = relative * (norm(self.parameters[name] for name in own) or 1.0) / length
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad(), _moved(self.parameters, own, sign * size):
                ends.append(self.stats(self.model, examples.inputs, examples.labels, self.loss.statistics))
        ahead, behind = (end.present() for end in ends)
        through = self.loss.differentiates
        return Stats(**{name: (ahead[name].double() - behind[name].double()) / (2 * size) for name in through})


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
