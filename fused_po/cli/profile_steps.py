"""The steps that ``fused-po profile`` predicts and measures: through a head alone, or through a whole model."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_po import linear_loss, losses
from fused_po.diagnostics.memory import peak_memory
from fused_po.diagnostics.prediction import MemoryPrediction, largest_length, predict_memory
from fused_po.ledger import record
from fused_po.ops.explain import explain, usual_route
from fused_po.prices import Device
from fused_po.trainers.loading import load_model
from fused_po.trainers.model import hidden_and_head

__all__ = ["HeadSteps", "ModelSteps", "Steps", "free_memory", "snapshot"]

# tokens at which a model's own memory is measured, to extend it to any length
CALIBRATION = (256, 512, 1024)
# rows and columns of a product that says how fast a device is, and what a step takes beside its products, at a guess
PACE_ROWS, PACE_COLUMNS, BESIDE = 64, 4096, 2.0


def free_memory(device: str) -> int:
    """Bytes that a process can still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class Steps(ABC):
    """Forward and backward of DPO on one pair, by one of two routes: ``fused`` or ``full_logits``.

    Attributes:
        hidden, vocab: of the head.
        frozen: its weight gets no gradient.
        longest: tokens of the longest pair that can be run at all; None: no such bound.
    """

    hidden: int
    vocab: int
    frozen: bool
    longest: int | None = None

    def __init__(self, device: str, dtype: torch.dtype, scratch_bytes: int | None, seed: int) -> None:
        self.device, self.dtype, self.scratch_bytes = device, dtype, scratch_bytes
        self.seed = seed

    @abstractmethod
    def describe(self) -> str:
        """What is profiled."""

    @abstractmethod
    def predict(self, route: str, length: int) -> dict[str, int]:
        """Bytes alive at the peak, by what they hold."""

    @abstractmethod
    def held(self, route: str, length: int) -> int:
        """Bytes of what a step finds, part of the predicted peak."""

    @abstractmethod
    def make(self, route: str, length: int) -> Callable[[], object]:
        """A step on inputs that exist."""

    def pace(self, route: str) -> float:
        """Seconds a token that a step may take, before any has run: from a product of few rows and columns."""
        columns = min(self.vocab, PACE_COLUMNS)
        given: Any = {"device": self.device, "dtype": self.dtype}
        hidden, weight = torch.zeros(PACE_ROWS, self.hidden, **given), torch.zeros(columns, self.hidden, **given)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            (hidden @ weight.t())[0, 0].item()
            times.append(time.perf_counter() - start)
        return BESIDE * (2 if self.frozen else 3) * min(times) * self.vocab / columns / PACE_ROWS

    def on_paper(self, route: str, length: int, on: Device) -> float:
        """Seconds of a step through the head on a GPU that need not be there."""
        if route == "fused":
            shape = (self.hidden, self.vocab, True, self.dtype, self.dtype, not self.frozen)
            found = usual_route(length, *shape, self.device, self.scratch_bytes)
            return sum(found.seconds(length, fused=True, on=on).values())
        given: Any = {"device": "meta", "dtype": self.dtype}
        hidden = torch.empty(2, length // 2, self.hidden, **given).requires_grad_()
        weight = torch.empty(self.vocab, self.hidden, **given).requires_grad_(not self.frozen)
        labels = torch.empty(2, length // 2, dtype=torch.int64, device="meta")
        with record() as ledger:
            self.loss(route, hidden, weight, labels).backward()
        return ledger.seconds(on)

    @abstractmethod
    def forget(self) -> None:
        """Gradients of earlier steps, which would not be counted."""

    def largest(self, route: str, memory: int) -> int:
        """The most tokens that are predicted to fit."""
        fits = largest_length(
            memory, lambda length: MemoryPrediction(scratch=sum(self.predict(route, length).values()))
        )
        return fits if self.longest is None else min(fits, self.longest)

    def _head(self, route: str, length: int) -> MemoryPrediction:
        """Of the head alone."""
        return predict_memory(
            length,
            self.hidden,
            self.vocab,
            route="linear_loss" if route == "fused" else route,
            trainable=not self.frozen,
            dtype=self.dtype,
            device=self.device,
            scratch_bytes=self.scratch_bytes,
        )

    def explain(self, length: int, on: Device | None = None) -> str:
        """How the fused head goes through so many tokens, in words; ``on``: at whose prices."""
        return explain(
            length,
            self.hidden,
            self.vocab,
            dtype=self.dtype,
            trainable=not self.frozen,
            device=self.device if on is None else on.name,
            scratch_bytes=self.scratch_bytes,
        )

    @cached_property
    def generator(self) -> torch.Generator:
        """Made where something is run: the device of a prediction need not be there."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def labels(self, length: int, vocab: int) -> Tensor:
        return torch.randint(vocab, (2, length // 2), generator=self.generator, device=self.device)

    def loss(self, route: str, hidden: Tensor, weight: Tensor, labels: Tensor, **head: Any) -> Tensor:
        """DPO with a reference of 0: chosen, then rejected."""
        if route == "fused":
            loss, reference = losses.create("sigmoid"), torch.zeros(2, device=hidden.device)
            options = {**head, "scratch_bytes": self.scratch_bytes}
            return linear_loss(hidden, weight, labels, loss, ref_logp=reference, **options).loss
        logits = torch.nn.functional.linear(hidden, weight, head.get("bias"))
        return _unfused(logits, labels)


def _unfused(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(1)
    # the caller's logits are gone before backward, as they are where nobody holds them
    return torch.nn.functional.softplus(-0.1 * (logp[0] - logp[1]))


class HeadSteps(Steps):
    """The head alone, on random hidden states."""

    def __init__(self, hidden: int, vocab: int, *, frozen: bool, **common: Any) -> None:
        super().__init__(**common)
        self.hidden, self.vocab, self.frozen = hidden, vocab, frozen

    @staticmethod
    def of_model(name: str, *, frozen: bool, **common: Any) -> HeadSteps:
        """The shape of a model's head."""
        _, head = hidden_and_head(load_model(name, _NoTokenizer(), common["seed"]))
        vocab, hidden = head.weight.shape
        return HeadSteps(hidden, vocab, frozen=frozen, **common)

    def describe(self) -> str:
        kind = "frozen" if self.frozen else "trained"
        return f"{kind} head H={self.hidden} V={self.vocab}, {str(self.dtype).removeprefix('torch.')}, {self.device}"

    @cached_property
    def _weight(self) -> Tensor:
        # large ones take seconds to draw
        given: Any = {"generator": self.generator, "device": self.device, "dtype": self.dtype}
        weight = torch.randn(self.vocab, self.hidden, **given)
        return weight.div_(self.hidden**0.5).requires_grad_(not self.frozen)

    def forget(self) -> None:
        self.__dict__.get("_weight", torch.empty(0)).grad = None

    def predict(self, route: str, length: int) -> dict[str, int]:
        return self._head(route, length).parts()

    def held(self, route: str, length: int) -> int:
        return self._head(route, length).inputs

    def make(self, route: str, length: int) -> Callable[[], object]:
        # in the dtype of the step: what it is predicted to fit into has no room for more
        given: Any = {"generator": self.generator, "device": self.device, "dtype": self.dtype}
        hidden = torch.randn(2, length // 2, self.hidden, **given).requires_grad_()
        labels, weight = self.labels(length, self.vocab), self._weight

        def step() -> None:
            hidden.grad = weight.grad = None
            self.loss(route, hidden, weight, labels).backward()

        return step


class ModelSteps(Steps):
    """A whole model. What its layers keep for their backward is measured at three short lengths and extended by the
    quadratic through them (attention may be quadratic), what their backward takes beside it linearly; the head's share
    is that of ``predict_memory``.
    """

    def __init__(self, name: str, *, frozen: bool, **common: Any) -> None:
        super().__init__(**common)
        self.name = name
        self.model = load_model(name, _NoTokenizer(), common["seed"]).to(self.device, self.dtype)
        self.backbone, self.head = hidden_and_head(self.model, check=False)
        self.frozen = frozen
        self.head.weight.requires_grad_(not frozen)
        self.vocab, self.hidden = self.head.weight.shape
        self.parameters = sum(p.nbytes for p in self.model.parameters())
        self.longest = _longest(self.model)
        places: tuple[int, ...] = CALIBRATION
        if self.longest is not None and self.longest < max(CALIBRATION):
            places = tuple(max(2, self.longest * place // max(CALIBRATION) // 2 * 2) for place in CALIBRATION)
        start = time.perf_counter()
        saved, peaks = zip(*(self._calibrate(length) for length in places), strict=True)
        # counting memory slows steps down: an upper bound
        self.layer_pace = (time.perf_counter() - start) / sum(places)
        self.saved = partial(_quadratic, places, saved)
        # beside what is saved: gradients of the parameters, which stay, and of activations, which grow
        before, last = (peak - kept for peak, kept in zip(peaks[-2:], saved[-2:], strict=True))
        self.excess = places[-1], last, max(0.0, (last - before) / (places[-1] - places[-2]))

    def describe(self) -> str:
        kind = "frozen" if self.frozen else "trained"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"whole step of {self.name}, {kind} head H={self.hidden} V={self.vocab}, {dtype}, {self.device}"

    def predict(self, route: str, length: int) -> dict[str, int]:
        head = self._head(route, length)
        size = self.dtype.itemsize
        after = size * self.hidden * (length + (0 if self.frozen else self.vocab))
        in_head, in_layers = self.saved(length) + head.above_inputs, self.layers(length) + after
        if in_head >= in_layers:
            parts = {name: value for name, value in head.parts().items() if name != "inputs"}
            return {"parameters": self.parameters, "activations": self.saved(length), **parts}
        return {"parameters": self.parameters, "layers": self.layers(length), "gradients": after}

    def held(self, route: str, length: int) -> int:
        return self.parameters

    def make(self, route: str, length: int) -> Callable[[], object]:
        labels = self.labels(length, self.vocab)
        options = self.head.options

        def step() -> None:
            self.model.zero_grad()
            hidden = self.backbone(input_ids=labels)
            if route == "fused":
                self.loss(route, hidden, self.head.weight, labels, **options).backward()
            else:
                _unfused(self.head.logits(hidden), labels).backward()

        return step

    def pace(self, route: str) -> float:
        return super().pace(route) + self.layer_pace

    def forget(self) -> None:
        self.model.zero_grad()

    def layers(self, length: int) -> int:
        """Peak of the layers' own forward and backward."""
        at, last, slope = self.excess
        return self.saved(length) + max(0, round(last + slope * (length - at)))

    def _calibrate(self, length: int) -> tuple[int, int]:
        """Bytes that the layers save for their backward, and their own peak."""
        labels = self.labels(length, self.vocab)
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = self.backbone(input_ids=labels)
        del hidden

        def layers() -> None:
            hidden = self.backbone(input_ids=labels)
            hidden.backward(torch.ones_like(hidden))

        self.model.zero_grad()
        peak = peak_memory(layers, self.device)
        self.model.zero_grad()
        return sum(saved.values()), peak


def _longest(model: Any) -> int | None:
    """Tokens of the longest pair for which a model has positions, if it has a table of them (GPT-2, OPT)."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings()]
    # OPT's has two rows more
    found = any(positions <= table.num_embeddings <= positions + 2 for table in tables)
    return 2 * positions if found else None


class _NoTokenizer:
    """What a tiny model is told of its tokenizer."""

    eos_token_id, pad_token_id = 1, 0


def _quadratic(places: Sequence[int], values: Sequence[int], at: int) -> int:
    """The polynomial through the points, not below 0."""
    total = 0.0
    for i, (place, value) in enumerate(zip(places, values, strict=True)):
        weight = float(value)
        for j, other in enumerate(places):
            if i != j:
                weight *= (at - other) / (place - other)
        total += weight
    return max(0, round(total))


def snapshot(steps: Steps, length: int, path: Path) -> None:
    """A memory snapshot of a fused step on a GPU, for PyTorch's viewer."""
    step = steps.make("fused", length)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        step()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
