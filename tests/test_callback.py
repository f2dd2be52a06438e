"""``GradientAlignmentCallback`` in a Trainer of transformers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

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
    logged = [entry["step"] for entry in trainer.state.log_history if "G/whole" in entry]
    assert logged[-2:] == [2, 4]


def test_bad_input_is_refused_before_training():
    with pytest.raises(ValueError, match="every must be at least 1"):
        GradientAlignmentCallback(DATA, LOSS, TARGET, every=0)
    with pytest.raises(ValueError, match="advantage"):
        GradientAlignmentCallback(DATA, losses.create("ppo"), TARGET)
    empty = Examples(TARGET[0].inputs, torch.full_like(TARGET[0].labels, -100))
    with pytest.raises(ValueError, match="no loss token"):
        GradientAlignmentCallback(DATA, LOSS, [empty])
