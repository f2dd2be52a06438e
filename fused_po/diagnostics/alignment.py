"""The G diagnostic: whether a step on a loss makes the final model's responses more likely.

``G(L; theta) = <grad E_{D'}[-log pi(y'|x'; theta)], grad L(D; theta)>`` with D' the responses of the final model
("What Is Preference Optimization Doing, How and Why?", arXiv 2512.00778): steadily positive where the targets are
stable, near 0 or changing sign where the loss explores. G is linear in L, so the parts of a loss sum to the whole, and
to first order a step theta - eta grad L changes the mean NLL of D' by -eta G.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_po.diagnostics.examples import Examples, StatsOf, require_loss_tokens
from fused_po.diagnostics.gradients import accumulators, gradients, inner, norm, trained
from fused_po.diagnostics.parts import ALL_PARTS, Taken, independent, require_parts, take_apart
from fused_po.diagnostics.slopes import along, require_wide
from fused_po.losses.contract import Loss, Named
from fused_po.stats import Stats
from fused_po.trainers.model import token_stats_of

__all__ = ["Alignment", "by_layer", "gradient_alignment"]

# above this share of the sum of the sides' sizes, a directional G is worth a warning
DOUBTFUL = 0.02
# whose sizes an error is compared with
SCALE = ("positive", "negative", "rest")


@dataclass(frozen=True)
class Alignment:
    """G of each part of a loss, by block of parameters.

    Attributes:
        values: part -> block -> G. Parts are ``whole``; ``positive`` and ``negative``, its sides; ``rest``, terms and
            tokens without a side; ``top``, ``middle`` and ``bottom``, the thirds of the tokens with a side by the
            loss's own weight; and ``positive/top``, ..., ``negative/bottom``, the thirds of one side.
            whole = positive + negative + rest = top + middle + bottom + rest, and a side is the sum of its thirds.
            Each stands there a second time with "/no_reweighting" behind its name: with all weights replaced by their
            mean over D.
        norms: of the gradient of D' and of that of the whole loss, where ``cosine`` asked for them.
        error: how far the two steps of ``directional`` were apart, in the part where they differ most, and with
            ``cosine`` the whole from its exact value: as a share of |positive| + |negative| + |rest|. None for
            ``exact``.
        target_nll: the mean NLL of D', of which G is the slope.
    """

    values: Mapping[str, Mapping[str, float]]
    norms: tuple[float, float] | None = None
    error: float | None = None
    target_nll: float | None = None

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

    def cosine(self, part: str = "whole") -> float:
        """G of a part over the lengths of the two whole gradients: of the whole loss it is their cosine, and parts sum
        as they do in G. 0 where a gradient is.

        Raises:
            KeyError: as above.
            ValueError: measured without ``cosine``.
        """
        if self.norms is None:
            raise ValueError("the lengths of the gradients were not asked for: gradient_alignment(..., cosine=True)")
        product = self.norms[0] * self.norms[1]
        return self[part] / product if product > 0 else 0.0


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
    parts: Sequence[str] = ALL_PARTS,
    blocks: Callable[[str], str] | None = None,
    step: float | None = None,
    cosine: bool = False,
    stats: StatsOf = token_stats_of,
) -> Alignment:
    """G: the inner product of two gradients at the model's parameters, that of a loss (or of a part of it) on examples
    D, and that of the negative log-likelihood of D', responses of the final model. Above 0: a step on the loss makes
    these responses more likely. The model is left as it was, gradients included.

    Args:
        model: any module; its parameters that require a gradient count. Put it into eval mode for G without dropout.
        batches: D, cut so that a batch fits into memory: the loss is that of all batches as one call, and so are the
            means and thirds of weights. Where to cut is a matter of memory alone; pairs must stay together.
        loss: from ``fused_po.losses.create``.
        target: D', cut likewise; side inputs are not read.
        method: ``exact``, inner products of gradients, a backward for each part that is no sum of others; or
            ``directional``, the change of all log-probs along the gradient of D', four forwards or more for all parts
            together. It needs parameters of 32 bits or more, and warns where its two steps differ by more than 2 % of
            the sum of the sides' sizes.
        reduction: of the NLL over D': ``sequence``, the mean over responses of their sums (the definition), or
            ``token``, the mean over tokens.
        parts: which are wanted, as ``Alignment`` names them; default all. Fewer are cheaper in ``exact``.
        blocks: from a parameter's name to its block (``by_layer``); None: all in one, "all". ``directional`` takes
            its forwards for each block.
        step: length of the larger step of ``directional`` over that of the block's parameters. None: it is looked
            for, until a step and a quarter of it agree to 0.5 %.
        cosine: also measure the lengths of both gradients: one more gradient in memory, and a backward of the whole
            loss in ``directional``, which is then compared with its exact G.
        stats: ``stats(model, inputs, labels, outputs)``, differentiable statistics in the shape of labels; default
            for causal language models of transformers.

    Raises:
        ValueError: D' or D that is no list of ``Examples`` or holds no loss token, batches that make no whole,
            ``blocks`` that is no function, a label beyond the model's vocabulary (D' of another tokenizer), an unknown
            method, reduction or part, a model without trainable parameters, or with ones that ``directional`` can't
            move.
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
    require_parts(parts)
    for name, given in (("target (D')", target), ("batches (D)", batches)):
        require_loss_tokens(name, given)
    parameters = trained(model)
    if method == "directional":
        require_wide(parameters)
    block_of = {name: "all" if blocks is None else blocks(name) for name in parameters}
    direction, nll = _target_gradient(model, parameters, target, reduction, stats)
    # an error is told as a share of the sides
    wanted = tuple(dict.fromkeys((*parts, *(SCALE if method == "directional" else ()), *(["whole"] * cosine))))
    sums = independent(wanted)
    measured = tuple(dict.fromkeys(one for counts in sums.values() for one in counts))
    run = _Run(model, batches, block_of, direction, loss, stats, take_apart(model, batches, loss, stats, (), measured))
    found, norms, error = (
        run.exact(measured, sums, cosine) if method == "exact" else run.directional(measured, sums, cosine, step)
    )
    values = {
        part: Named("block", {b: _sum(counts, {one: found[one][b] for one in measured}) for b in run.blocks})
        for part, counts in sums.items()
        if part in parts
    }
    if error is not None and not error <= DOUBTFUL:
        warnings.warn(
            f"G along the gradient of D' is uncertain by {100 * error:.1f} % of the sum of its sides' sizes, its two "
            "steps disagree; method='exact' takes none",
            stacklevel=3,
        )
    return Alignment(Named("part", values), norms, error, nll)


def _sum(counts: Mapping[str, int], values: Mapping[str, float]) -> float:
    return float(sum(count * values[part] for part, count in counts.items()))


def _target_gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], target: Sequence[Examples], reduction: str, stats: StatsOf
) -> tuple[dict[str, Tensor], float]:
    """The gradient of the mean NLL of D', and that mean."""
    labels = [examples.labels for examples in target]
    counted = (one >= 0 if reduction == "token" else (one >= 0).any(-1) for one in labels)
    count, nll = sum(int(one.sum()) for one in counted), 0.0
    total = accumulators(parameters)
    for examples in target:
        try:
            logp = stats(model, examples.inputs, examples.labels, ("logp",)).logp
        except (ValueError, IndexError) as error:
            raise ValueError(f"D' does not fit the model (another tokenizer?): {error}") from error
        assert logp is not None
        value = -torch.where(examples.labels >= 0, logp, 0.0).sum() / count
        nll += value.item()
        for name, grad in gradients(value, parameters).items():
            total[name] += grad
    return total, nll


Found = dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Run:
    """Both estimators; the slopes of statistics and the gradients of parameters are taken along ``direction``."""

    model: nn.Module
    batches: Sequence[Examples]
    block_of: Mapping[str, str]
    direction: Mapping[str, Tensor]
    loss: Loss
    stats: StatsOf
    taken: Taken

    @property
    def blocks(self) -> list[str]:
        return list(dict.fromkeys(self.block_of.values()))

    def exact(
        self, measured: Sequence[str], sums: Mapping[str, Mapping[str, int]], cosine: bool
    ) -> tuple[Found, tuple[float, float] | None, None]:
        """part -> block -> G by the inner products of gradients, norms, and no error."""
        found = {part: dict.fromkeys(self.blocks, 0.0) for part in measured}
        parameters = trained(self.model)
        whole = accumulators(parameters) if cosine else None
        parts = [part for part in measured if not self.taken.is_zero(part)]
        for index, examples in enumerate(self.batches):
            if not parts:
                break
            given = self._stats(examples)
            for part in parts:
                value = self.taken.weighted(index, given, part)
                for name, grad in gradients(value, parameters, keep=part is not parts[-1]).items():
                    found[part][self.block_of[name]] += inner(grad, self.direction[name])
                    if whole is not None and (count := sums["whole"].get(part)):
                        whole[name].add_(grad, alpha=count)
        return found, None if whole is None else self._norms(whole), None

    def directional(
        self, measured: Sequence[str], sums: Mapping[str, Mapping[str, int]], cosine: bool, step: float | None
    ) -> tuple[Found, tuple[float, float] | None, float]:
        """part -> block -> G by the slopes of the statistics, norms, and the error over the sum of the sides."""
        found: Found = {part: {} for part in measured}
        parameters, apart = trained(self.model), 0.0

        @torch.no_grad()
        def measure() -> dict[str, float]:
            values = dict.fromkeys(measured, 0.0)
            for index, examples in enumerate(self.batches):
                given = self._stats(examples)
                for part in measured:
                    values[part] += self.taken.weighted(index, given, part).item()
            return values

        def scale(values: Mapping[str, float]) -> float:
            return sum(abs(_sum(sums[part], values)) for part in SCALE)

        for block in self.blocks:
            own = {name: way for name, way in self.direction.items() if self.block_of[name] == block}
            slopes, error = along(own, parameters, measure, scale, step)
            for part, slope in slopes.items():
                found[part][block] = slope
            apart += error * scale(slopes)
        total = {part: sum(per_block.values()) for part, per_block in found.items()}
        size, norms = scale(total) or 1.0, None
        if cosine:
            whole, norms = self._whole()
            apart = max(apart, abs(whole - _sum(sums["whole"], total)))
        return found, norms, apart / size

    def _whole(self) -> tuple[float, tuple[float, float]]:
        """G of the whole loss by gradients, and their norms."""
        parameters = trained(self.model)
        taken = take_apart(self.model, self.batches, self.loss, self.stats, (), ("whole",))
        total = accumulators(parameters)
        for index, examples in enumerate(self.batches):
            for name, grad in gradients(taken.weighted(index, self._stats(examples), "whole"), parameters).items():
                total[name] += grad
        return sum(inner(grad, self.direction[name]) for name, grad in total.items()), self._norms(total)

    def _norms(self, whole: Mapping[str, Tensor]) -> tuple[float, float]:
        return norm(self.direction.values()), norm(whole.values())

    def _stats(self, examples: Examples) -> Stats:
        return self.stats(self.model, examples.inputs, examples.labels, self.loss.statistics)
