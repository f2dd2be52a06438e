"""``GradientAlignmentCallback`` in a Trainer of transformers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from fused_po import losses
from fused_po.diagnostics import Examples, GradientAlignmentCallback, gradient_alignment
from tests.test_checkpoints import DATA, LOSS, TARGET, V, tiny


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, V, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def test_g_is_measured_and_logged(tmp_path):
    model = tiny(0)
    before = gradient_alignment(tiny(0), DATA, LOSS, TARGET, method="exact")
    callback = GradientAlignmentCallback(DATA, LOSS, TARGET, every=2, method="exact")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    assert [step for step, _ in callback.history] == [0, 2, 4]
    assert callback.history[0][1]["whole"] == pytest.approx(before["whole"], rel=1e-6)
    after = gradient_alignment(model.eval(), DATA, LOSS, TARGET, method="exact")
    assert callback.history[-1][1]["negative"] == pytest.approx(after["negative"], rel=1e-5)
    logged = {entry["step"]: entry["G/whole"] for entry in trainer.state.log_history if "G/whole" in entry}
    assert logged == {step: numbers["whole"] for step, numbers in callback.history}


class Reporter(TrainerCallback):
    """Copies what it is told, as TensorBoard's and W&B's do."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, dict(logs)))


@pytest.mark.parametrize(("every", "logging"), [(2, 3), (3, 2), (2, 100), (1, 1)])
def test_each_measurement_is_told_at_its_step(tmp_path, every, logging):
    callback, reporter = GradientAlignmentCallback(DATA, LOSS, TARGET, every=every), Reporter()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, logging_steps=logging, report_to="none", use_cpu=True
    )
    trainer = Trainer(model=tiny(0), args=arguments, train_dataset=Rows(), callbacks=[reporter])
    assert callback.attach(trainer) is callback
    assert callback.attach(trainer).history == []
    trainer.train()
    steps = list(range(0, 7, every))
    want = {step: numbers["whole"] for step, numbers in callback.history}
    assert list(want) == steps
    told = {step: logs["G/whole"] for step, logs in reporter.told if "G/whole" in logs}
    assert told == {step: value for step, value in want.items() if step > 0}
    kept = [(entry["step"], entry["G/whole"]) for entry in trainer.state.log_history if "G/whole" in entry]
    assert kept == list(want.items())
    # every logging step has its loss, too
    losses_at = {step for step, logs in reporter.told if "loss" in logs}
    assert losses_at >= {step for step in range(1, 7) if step % logging == 0}


def test_bad_input_is_refused_before_training():
    with pytest.raises(ValueError, match="every must be at least 1"):
        GradientAlignmentCallback(DATA, LOSS, TARGET, every=0)
    with pytest.raises(ValueError, match="advantage"):
        GradientAlignmentCallback(DATA, losses.create("ppo"), TARGET)
    empty = Examples(TARGET[0].inputs, torch.full_like(TARGET[0].labels, -100))
    with pytest.raises(ValueError, match="no loss token"):
        GradientAlignmentCallback(DATA, LOSS, [empty])
