"""``PreferenceTrainer``: devices, the order of rows, stale references, and weights that are no numbers."""

from __future__ import annotations

import dataclasses
import math
import os
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fused_po import losses
from fused_po.trainers.averages import Averages, weighed_metrics
from fused_po.trainers.batches import collate
from fused_po.trainers.preferences import PreferenceTrainer
from tests.test_preference_trainer import model_of, rows, trainer_of
from tests.test_references import references


def test_batches_that_lie_on_a_device_are_counted_there(tmp_path):
    """As an engine hands them over that moved them already; another device than the CPU needs no GPU."""
    trainer = trainer_of(tmp_path, losses.create("simpo"))
    labels = torch.zeros(4, 3, dtype=torch.int64, device="meta")
    _, counted = trainer.get_batch_samples(iter([{"labels": labels}] * 2), 2, labels.device)
    assert counted.device.type == "meta" and counted.shape == (3,)


def test_the_order_of_rows_is_that_of_the_seed(tmp_path):
    """Whatever torch's global seed is when training begins."""
    seen = []
    for seed in (1, 2):
        trainer = trainer_of(tmp_path, losses.create("sft", paired=True), max_steps=9)
        torch.manual_seed(seed)
        seen.append([batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()])
    assert seen[0] == seen[1]
    other = trainer_of(tmp_path, losses.create("sft", paired=True), max_steps=9, seed=5)
    assert [batch["input_ids"].tolist() for batch in other.get_train_dataloader()] != seen[0]


@pytest.mark.parametrize("change", ["alpha", "disabled"])
def test_an_adapter_of_another_scale_is_another_reference(tmp_path, monkeypatch, change):
    asked = references(monkeypatch, tmp_path)

    def adapted(alpha=4):
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
        model = model_of()
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    found = []
    for changed in (False, False, True):
        model = adapted(8 if changed and change == "alpha" else 4)
        if changed and change == "disabled":
            model.base_model.disable_adapter_layers()
        model.requires_grad_(True)
        trainer = trainer_of(tmp_path, losses.create("sigmoid"), rows(9), model=model)
        found.append(list(trainer.train_dataset["ref"]))
    assert sum(asked) == 2 * 2 * 8
    assert found[0] == found[1] != found[2]


def test_a_step_that_the_scaler_of_float16_skips_goes_on(tmp_path):
    trainer = trainer_of(tmp_path, losses.create("simpo"))
    with pytest.raises(FloatingPointError, match="gradient norm inf"):
        trainer.log({"loss": 1.0, "grad_norm": math.inf})
    trainer.accelerator.scaler = SimpleNamespace()
    trainer.log({"loss": 1.0, "grad_norm": math.inf})
    (logged,) = trainer.state.log_history
    assert logged["loss"] == 1.0 and "grad_norm" not in logged
    with pytest.raises(FloatingPointError, match="loss nan"):
        trainer.log({"loss": math.nan, "grad_norm": 1.0})


def test_weights_that_are_no_numbers_replace_no_checkpoint(tmp_path, monkeypatch):
    """Though nothing is logged that would show it."""
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3, "logging_steps": 100}
    trainer = trainer_of(tmp_path, losses.create("sft", paired=True), **options)
    before = PreferenceTrainer.training_step

    def broken(self, model, *given, **named):
        loss = before(self, model, *given, **named)
        if self.state.global_step == 1:
            next(model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(PreferenceTrainer, "training_step", broken)
    with pytest.raises(FloatingPointError, match="step 2: weights are no numbers"):
        trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-1"]


def test_padding_of_an_evaluation_moves_no_reference_point(tmp_path, monkeypatch):
    """A rank whose last batch holds rows that were there before, and no other, adds nothing to KTO's."""
    trainer = trainer_of(tmp_path, losses.create("kto"), None, rows(4), per_device_eval_batch_size=2)
    batch = next(iter(trainer.get_eval_dataloader()))
    state = SimpleNamespace(end_of_dataloader=True, remainder=1)
    told: list[list[float]] = []

    def reduce(sums: Tensor, how: str) -> Tensor:
        told.append(sums.tolist())
        # of the other rank
        return sums + torch.tensor([6.0, 4.0])

    monkeypatch.setattr(
        trainer,
        "accelerator",
        SimpleNamespace(gradient_state=state, reduce=reduce, autocast=trainer.accelerator.autocast),
    )
    monkeypatch.setattr(trainer, "args", SimpleNamespace(process_index=1))
    monkeypatch.setattr(trainer, "_prepare_inputs", dict)
    trainer.prediction_step(trainer.model, batch)
    # all ranks name the same metrics, but none of these counts
    assert told == [[0.0, 0.0]] and trainer._eval._sums
    assert not any(torch.stack(list(trainer._eval._sums.values())).flatten())
    trainer.args.process_index = 0
    trainer.prediction_step(trainer.model, batch)
    assert told[1][1] == 2.0 and all(weight > 0 for _, weight in trainer._eval._sums.values())


def test_metrics_weigh_what_they_are_means_of():
    """Tokens for those over tokens, answers for others, KTO's reference point among them."""
    averages, accelerator = Averages(), SimpleNamespace(reduce=lambda sums, how: sums)
    for mismatch in (False, True):
        for answers, tokens, value in ((2, 10, 1.0), (6, 1, 0.0)):
            batch = {"labels": torch.ones(answers, tokens), "signs": torch.ones(answers)}
            batch |= {"other_labels": batch["labels"]} if mismatch else {}
            named = {
                name: torch.tensor(value) for name in ("kl", "cispo_clip_ratio", "rewards/chosen", "logits/chosen")
            }
            stats = SimpleNamespace(logp=None)
            averages.add(
                weighed_metrics(batch, SimpleNamespace(loss=torch.tensor(value), metrics=named, stats=stats), True)
            )
        found = averages.take(accelerator)
        by_tokens, by_answers = 20 / 26, 2 / 8
        assert found["kl"] == pytest.approx(by_answers if mismatch else by_tokens)
        assert found["cispo_clip_ratio"] == found["logits/chosen"] == pytest.approx(by_tokens)
        assert found["rewards/chosen"] == pytest.approx(by_answers) and found["loss"] == 1.0


def test_only_whole_checkpoints_are_pushed(tmp_path, monkeypatch):
    pushed: list[tuple[str, list[str]]] = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = trainer_of(tmp_path, losses.create("sft", paired=True), **options)
    trainer.args.push_to_hub = True
    trainer.train()
    names = [f"checkpoint-{step}" for step in (1, 2)]
    assert pushed == [(str(tmp_path / names[0]), names[:1]), (str(tmp_path / names[1]), names)]


def test_what_is_logged_is_the_mean_of_the_steps_since_the_last_time(tmp_path):
    logged = []
    for every in (1, 2):
        options = {"max_steps": 4, "logging_steps": every, "per_device_train_batch_size": 2}
        trainer = trainer_of(tmp_path, losses.create("simpo"), **options)
        trainer.train()
        logged.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    single, double = logged
    assert double == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2], rel=1e-6)


def test_rows_in_sequence_stay_in_it(tmp_path):
    """Where the engine is told not to draw, nothing is selected by a draw."""
    options = {"max_steps": 2, "per_device_train_batch_size": 2}
    named = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "train_sampling_strategy" not in named:
        pytest.skip("this engine always draws")
    data = rows(9)
    trainer = trainer_of(tmp_path, losses.create("simpo"), data, train_sampling_strategy="sequential", **options)
    ids = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    wanted = collate(data.select(range(2)).to_list(), 0)["input_ids"]
    assert torch.equal(ids[0], wanted) and len(ids) == 5


def test_a_checkpoint_that_is_there_is_replaced(tmp_path):
    """As by a run in a folder of an older one."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    for rate in (0.1, 0.2):
        trainer = trainer_of(tmp_path, losses.create("simpo"), learning_rate=rate, **options)
        trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters(), strict=True))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="several GPUs in one process"):
        trainer_of(tmp_path, losses.create("simpo"))
