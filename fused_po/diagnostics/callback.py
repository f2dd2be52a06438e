"""The G diagnostic in any ``Trainer`` of transformers or TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from fused_po.diagnostics.alignment import gradient_alignment
from fused_po.diagnostics.parts import Examples
from fused_po.losses.contract import Loss

__all__ = ["GradientAlignmentCallback"]


class GradientAlignmentCallback(TrainerCallback):
    """Measures G on fixed examples every few steps and logs it as ``G/whole``, ``G/positive``, ``G/negative``, ...

    D' are answers of the final model; while that is still in training, answers of an earlier run's final model, or of
    the model that the training should lead to. The model must be whole on each rank (one GPU, DDP): under FSDP or
    ZeRO-3 take ``alignment_over_checkpoints`` afterwards.

    Args:
        batches: D, on the model's device.
        loss: from ``fused_po.losses.create``, as it is trained.
        target: D', on the model's device.
        every: steps between measurements, 50; the first is before training.
        parts: of G that are logged.
        options: of ``gradient_alignment``.

    Attributes:
        history: (step, part -> G) of each measurement.

    Raises:
        ValueError: ``every`` below 1, side inputs that the loss misses, a D' without a loss token: all before training.
    """

    def __init__(
        self,
        batches: Sequence[Examples],
        loss: Loss,
        target: Sequence[Examples],
        *,
        every: int = 50,
        parts: Sequence[str] = ("whole", "positive", "negative"),
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1: got {every}")
        for examples in batches:
            loss.check(frozenset(examples.side_inputs))
        if not any(bool((examples.labels >= 0).any()) for examples in target):
            raise ValueError("target (D') holds no loss token")
        self._batches, self._loss, self._target = batches, loss, target
        self._every, self._parts, self._options = every, tuple(parts), options
        self.history: list[tuple[int, dict[str, float]]] = []
        self._waiting: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._measure(state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._measure(state.global_step, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update(self._waiting)
        self._waiting = {}

    def _measure(self, step: int, model: Any) -> None:
        # DistributedDataParallel keeps the model in .module
        model = getattr(model, "module", model)
        training = model.training
        model.eval()
        try:
            found = gradient_alignment(model, self._batches, self._loss, self._target, **self._options)
        finally:
            model.train(training)
        numbers = {part: found[part] for part in self._parts}
        self.history.append((step, numbers))
        self._waiting = {f"G/{part}": value for part, value in numbers.items()}
