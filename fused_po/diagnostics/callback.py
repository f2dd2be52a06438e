"""The G diagnostic in any ``Trainer`` of transformers or TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from fused_po.diagnostics.alignment import gradient_alignment
from fused_po.diagnostics.examples import Examples, require_examples, require_loss_tokens
from fused_po.diagnostics.parts import require_parts
from fused_po.losses.contract import Loss

__all__ = ["GradientAlignmentCallback"]


class GradientAlignmentCallback(TrainerCallback):
    """Measures G on fixed examples every few steps and logs it as ``G/whole``, ``G/positive``, ``G/negative``, ...;
    ``gradient_alignment`` says what G, D and D' are.

    ``GradientAlignmentCallback(...).attach(trainer)`` shows it to all that read a trainer's log. A trainer's
    ``callbacks=[...]`` comes after its reporters (TensorBoard, W&B), and these then see nothing of it; ``history`` and
    ``state.log_history`` hold it either way. Every measured step is logged, whatever ``logging_steps``; step 0, before
    training, in the two histories only.

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
        ValueError: ``every`` below 1, unknown ``parts``, side inputs that the loss misses, a D or D' that is no list of
            ``Examples``, a D' without a loss token: all before training.
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
        require_parts(parts)
        require_examples("batches (D)", batches)
        for examples in batches:
            loss.check(frozenset(examples.side_inputs))
        require_loss_tokens("target (D')", target)
        self._batches, self._loss, self._target = batches, loss, target
        self._every, self._parts, self._options = every, tuple(parts), options
        self.history: list[tuple[int, dict[str, float]]] = []
        self._waiting: dict[str, float] = {}

    def attach(self, trainer: Any) -> GradientAlignmentCallback:
        """Take the first place among the callbacks of a ``Trainer``, ahead of its reporters; returns itself."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # of a run that is resumed, this step has been measured
        if state.global_step == 0:
            numbers = self._measure(0, model)
            state.log_history.append({**numbers, "step": 0})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._waiting = self._measure(state.global_step, model)
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update(self._waiting)
        self._waiting = {}

    def _measure(self, step: int, model: Any) -> dict[str, float]:
        # DistributedDataParallel keeps the model in .module
        model = getattr(model, "module", model)
        training = model.training
        model.eval()
        try:
            found = gradient_alignment(
                model, self._batches, self._loss, self._target, parts=self._parts, **self._options
            )
        finally:
            model.train(training)
        numbers = {part: found[part] for part in self._parts}
        self.history.append((step, numbers))
        return {f"G/{part}": value for part, value in numbers.items()}
