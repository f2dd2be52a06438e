"""The reference of ``PreferenceTrainer``: asked once, for what is used, kept by content; and mismatched answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from torch import Tensor

from fused_po import losses
from fused_po.trainers.preferences import PreferenceTrainer
from tests.test_preference_trainer import model_of, rows, trainer_of


def references(monkeypatch: Any, folder: Path) -> list[int]:
    """Sizes of the batches that a reference is asked about from now on, with a cache of their own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    asked: list[int] = []
    before = PreferenceTrainer.log_probs

    def note(self: Any, model: Any, batch: Any, prefix: str = "") -> Tensor:
        asked.append(len(batch[f"{prefix}labels"]))
        return before(self, model, batch, prefix)

    monkeypatch.setattr(PreferenceTrainer, "log_probs", note)
    return asked


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_reference_is_asked_once_for_the_rows_that_are_used(tmp_path, monkeypatch, place):
    asked = references(monkeypatch, tmp_path)

    def data(seed: int = 0) -> Dataset:
        made = rows(9, seed)
        if place == "disk":
            made.save_to_disk(str(tmp_path / f"rows-{seed}"))
            made = Dataset.load_from_disk(str(tmp_path / f"rows-{seed}"))
        return made

    short = {"max_steps": 2, "per_device_train_batch_size": 2}
    first = trainer_of(tmp_path, losses.create("sigmoid"), data(), **short)
    assert sum(asked) == 2 * 4
    again = trainer_of(tmp_path, losses.create("sigmoid"), data(), **short)
    assert sum(asked) == 2 * 4
    assert first.train_dataset.to_list() == again.train_dataset.to_list()
    # other weights are another reference, and other rows have other log-probs
    trainer_of(tmp_path, losses.create("sigmoid"), data(), model=model_of(7), **short)
    trainer_of(tmp_path, losses.create("sigmoid"), data(1), **short)
    assert sum(asked) == 3 * 2 * 4
    trainer_of(tmp_path, losses.create("simpo"), data())
    trainer_of(tmp_path, losses.create("sft", paired=True), data())
    assert sum(asked) == 3 * 2 * 4


def test_log_probs_that_others_made_are_not_read(tmp_path):
    """A column may be called ref for another reason, or be of another reference."""
    loss, data = losses.create("sigmoid"), rows()
    wanted = trainer_of(tmp_path, loss, data, data).train_dataset
    foreign = data.add_column("ref", [[[0.0], [0.0]]] * len(data)).add_column("ref_chosen_logps", [1.0] * len(data))
    trainer = trainer_of(tmp_path, loss, foreign, wanted, reference=model_of(1))
    assert trainer.train_dataset["ref"] != wanted["ref"] and trainer.train_dataset.column_names == wanted.column_names
    assert trainer.eval_dataset["ref"] == trainer_of(tmp_path, loss, data, reference=model_of(1)).train_dataset["ref"]
    # rows of a loss without mismatched answers serve one with them
    assert "other_ref" in trainer_of(tmp_path, losses.create("kto"), wanted).train_dataset.column_names


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_the_mismatched_answers_of_a_row_do_not_depend_on_the_steps(tmp_path, steps):
    """Nor on the order of rows: they are those of the next row of the data."""
    data = rows(9)
    trainer = trainer_of(tmp_path, losses.create("kto"), data, max_steps=steps, per_device_train_batch_size=2)
    listed = data.to_list()
    for row in trainer.train_dataset:
        place = next(index for index, one in enumerate(listed) if one["ids"] == row["ids"])
        other = listed[(place + 1) % 9]
        for side in (0, 1):
            prompt, answer = row["ids"][side][: row["starts"][side]], other["ids"][side][other["starts"][side] :]
            ids = row["other_ids"][side]
            assert ids == (prompt + answer)[: len(ids)] and len(ids) > len(prompt)
