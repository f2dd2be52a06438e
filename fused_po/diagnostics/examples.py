"""Examples that a loss is measured on, in batches that fit into memory, and all of them as one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.losses.batch import SCALAR
from fused_po.losses.contract import listed
from fused_po.ops.checks import IGNORE
from fused_po.stats import Stats

__all__ = ["Examples", "Joined", "StatsOf", "joined", "require_examples", "require_loss_tokens"]

StatsOf = Callable[[nn.Module, Mapping[str, Any], Tensor, Sequence[str]], Stats]


@dataclass(frozen=True, init=False)
class Examples:
    """A batch of examples: of D, on which a loss is taken, or of D', the responses of a final model.

    Attributes:
        inputs: what the model takes; (B, S) each for a causal language model.
        labels: (B, S - 1) for a causal language model: already shifted, -100 ignored. Pairs: first half chosen.
        side_inputs: what the loss reads, as in ``linear_loss``, in one mapping.

    Raises:
        TypeError: side inputs as keywords of their own.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    side_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self, inputs: Mapping[str, Any], labels: Tensor, side_inputs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        if others:
            shown = ", ".join(f'"{name}": ...' for name in others)
            raise TypeError(
                f"Examples takes side inputs in one mapping, Examples(inputs, labels, {{{shown}}}): "
                f"got {listed(others)} as keywords"
            )
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "side_inputs", {} if side_inputs is None else side_inputs)

    def to(self, device: str | torch.device) -> Examples:
        """The same on a device; what is no tensor stays as it is."""

        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value.to(device) if hasattr(value, "to") else value for name, value in values.items()}

        return Examples(moved(self.inputs), self.labels.to(device), moved(self.side_inputs))


@dataclass(frozen=True)
class Joined:
    """Batches as one call.

    Attributes:
        labels: (B, S - 1) of all of them, padded with -100 on the right. Where every batch has an even number of
            sequences, the first halves of all batches come before the second halves: pairs stay pairs.
        side_inputs: likewise.
        places: of each batch, which sequences are its own, (B of the batch,) int64.
        widths: of each batch, how many positions its labels have.
    """

    labels: Tensor
    side_inputs: Mapping[str, Any]
    places: tuple[Tensor, ...]
    widths: tuple[int, ...]

    def join(self, values: Sequence[Tensor], fill: float | bool = 0) -> Tensor:
        """Numbers of each batch, per sequence or in the shape of its labels, in the order of all."""
        shape = self.labels.shape[: values[0].ndim]
        whole = values[0].new_full(shape, fill)
        for value, place, width in zip(values, self.places, self.widths, strict=True):
            if value.ndim == 1:
                whole[place] = value
            else:
                whole[place, :width] = value
        return whole

    def part(self, index: int, whole: Tensor) -> Tensor:
        """What ``join`` put together, of one batch again."""
        found = whole[self.places[index]]
        return found if whole.ndim == 1 else found[:, : self.widths[index]]


def joined(batches: Sequence[Examples]) -> Joined:
    """All batches as one call, whatever cut they came in; inputs of the model stay where they are.

    Raises:
        ValueError: labels that are not (B, S), side inputs of other shapes than labels or sequences, side inputs that
            only some batches have, a scalar that differs between batches.
    """
    counts = [examples.labels.shape[0] for examples in batches]
    if any(examples.labels.ndim != 2 for examples in batches):
        raise ValueError("labels of Examples must be (B, S), a row for each sequence")
    device, total = batches[0].labels.device, sum(counts)
    paired = all(count % 2 == 0 for count in counts)
    places, first = [], 0
    for count in counts:
        if paired:
            half = torch.arange(first, first + count // 2, device=device)
            places.append(torch.cat([half, half + total // 2]))
            first += count // 2
        else:
            places.append(torch.arange(first, first + count, device=device))
            first += count
    widths = tuple(examples.labels.shape[1] for examples in batches)
    empty = batches[0].labels.new_full((total, max(widths, default=0)), IGNORE)
    frame = Joined(empty, {}, tuple(places), widths)
    names = list(dict.fromkeys(name for examples in batches for name in examples.side_inputs))
    side_inputs = {name: _side_input(name, batches, frame) for name in names}
    labels = frame.join([examples.labels for examples in batches], IGNORE)
    return Joined(labels, side_inputs, frame.places, widths)


def _side_input(name: str, batches: Sequence[Examples], frame: Joined) -> Any:
    """Of all batches; what has no legal shape in a single batch goes on as it is, to be refused there."""
    values = [examples.side_inputs.get(name) for examples in batches]
    if any(value is None for value in values):
        raise ValueError(f"only some batches have {name}: it is wanted in all of them or in none")
    if len(values) == 1:
        return values[0]
    if name in SCALAR:
        numbers = {float(value) for value in values}  # type: ignore[arg-type]
        if len(numbers) > 1:
            raise ValueError(
                f"{name} differs between batches ({min(numbers):.6g} to {max(numbers):.6g}): a loss over all of them "
                "has one"
            )
        return values[0]
    for value, examples in zip(values, batches, strict=True):
        shape = tuple(examples.labels.shape)
        if not isinstance(value, Tensor) or tuple(value.shape) not in (shape, shape[:1]):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must have shape {shape[:1]} or {shape}: got {got}")
    if len({value.ndim for value in values if isinstance(value, Tensor)}) > 1:
        raise ValueError(f"{name} is given per sequence in some batches and per token in others")
    return frame.join([value for value in values if isinstance(value, Tensor)])


def require_examples(name: str, batches: object) -> None:
    """Raise ValueError for what is no sequence of ``Examples``."""
    if isinstance(batches, Examples):
        raise ValueError(f"{name} must be a list of Examples: got one Examples, write [examples]")
    # it is read more than once
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise ValueError(f"{name} must be a list of Examples: got {type(batches).__name__}")
    for item in batches:
        if not isinstance(item, Examples):
            raise ValueError(
                f"{name} must hold Examples, Examples(inputs, labels, side_inputs): got {type(item).__name__}"
            )


def require_loss_tokens(name: str, batches: Iterable[Examples]) -> None:
    """Raise ValueError where no label of any batch counts, or for what is no sequence of ``Examples``."""
    require_examples(name, batches)
    if not any(bool((examples.labels >= 0).any()) for examples in batches):
        raise ValueError(f"{name} holds no loss token")
