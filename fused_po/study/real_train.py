"""The arms of a study on a pretrained model: DPO by ``PreferenceTrainer``, policies by TRL's GRPO on the fused path."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from fused_po import losses
from fused_po.losses import Loss
from fused_po.study.real_model import load
from fused_po.study.real_reward import Reward
from fused_po.study.real_settings import RealSettings, arms_of
from fused_po.study.real_splits import FlatWeights
from fused_po.trainers import whole
from fused_po.trainers.preferences import PreferenceTrainer

__all__ = ["checkpoints", "loss_of", "train"]

Say = Callable[[int], None]
# what a checkpoint holds beside the model, to go on from
_STATE = ("optimizer", "scheduler", "rng_state", "scaler")


def loss_of(method: str, settings: RealSettings) -> Loss:
    """What a method descends on."""
    if method == "dpo":
        return losses.create("sigmoid", beta=settings.beta)
    return losses.create("grpo", epsilon=settings.epsilon)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The whole checkpoints of a run, by update."""
    found = (path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file())
    return dict(sorted((int(path.name.rpartition("-")[2]), path) for path in found))


def train(
    settings: RealSettings,
    seed: int,
    method: str,
    arm: str,
    folder: Path,
    *,
    tokenizer: Any,
    pairs: Any,
    prompts: Sequence[dict[str, Any]],
    reward: Reward | None,
    say: Say,
) -> None:
    """Train an arm, from where it stopped; leaves a checkpoint at each of ``settings.due`` but 0.

    Args:
        folder: of the run.
        pairs: rows of ``load_preferences``, for DPO.
        prompts: rows with a prompt, for policies.
        reward: of policies.
        say: called with the number of updates done.

    Raises:
        FloatingPointError: the training diverged.
    """
    flat = FlatWeights(0.5 if method == "dpo" else None) if arm == "no reweighting" else None
    found = {step: path for step, path in checkpoints(folder).items() if flat is None or flat.is_in(path)}
    if settings.steps in found:
        return
    for path in folder.glob("checkpoint-*"):
        # written in part when the run was cut off
        if path not in found.values():
            shutil.rmtree(path)
    whole.begin_lines(folder / "training.jsonl")
    last = max(found.values(), key=lambda path: int(path.name.rpartition("-")[2])) if found else None
    split = arms_of(method)[arm]
    if flat is not None and last is not None:
        flat.restore(last)
    model = load(settings.model, None, settings.lora, seed, tokenizer)
    shared: dict[str, Any] = {"processing_class": tokenizer, "split": split if flat is None else flat}
    if method == "dpo":
        trainer: Any = _pairs_trainer(flat, settings.beta)(
            model,
            _engine(TrainingArguments, settings, seed, method, folder),
            pairs,
            loss=loss_of(method, settings),
            **shared,
        )
    else:
        trainer = _rollouts_trainer(settings, seed, folder, model, prompts, reward, flat, shared)
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    trainer.add_callback(_Keeper(folder, settings.due, flat, say))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _engine(kind: Any, settings: RealSettings, seed: int, method: str, folder: Path, **options: Any) -> Any:
    """transformers' ``TrainingArguments``, or TRL's: ``settings`` by its names."""
    answers = 2 if method == "dpo" else 1
    device = settings.device or "cpu"
    return kind(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch // answers,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        learning_rate=settings.lr(method),
        lr_scheduler_type="linear",
        warmup_steps=settings.steps // 10,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim=settings.optim,
        seed=seed,
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def _pairs_trainer(flat: FlatWeights | None, beta: float) -> type:
    if flat is None:
        return PreferenceTrainer
    noted = flat

    class Noting(PreferenceTrainer):
        """Tells of the weights of its pairs."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
            ratio = (out.stats.logp.double() - inputs["ref_logp"]).sum(1)  # (B,)
            chosen, rejected = ratio.chunk(2)
            noted.note(torch.sigmoid(-beta * (chosen - rejected)))
            return (loss, out) if return_outputs else loss

    return Noting


def _rollouts_trainer(
    settings: RealSettings,
    seed: int,
    folder: Path,
    model: Any,
    prompts: Sequence[dict[str, Any]],
    reward: Reward | None,
    flat: FlatWeights | None,
    shared: dict[str, Any],
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    from fused_po.trainers.trl import FusedGRPOTrainer

    assert reward is not None
    known = set.intersection(*(set(row) for row in prompts))
    rows = [{name: row[name] for name in row if name in known} for row in prompts]

    def rewards(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return reward(prompts, completions, {name: columns[name] for name in columns if name in known})

    class Noting(FusedGRPOTrainer):
        """Tells of the weights of its tokens."""

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            if flat is not None:
                flat.note(inputs["advantages"].reshape(-1).abs(), inputs["completion_mask"].sum(1))
            return super()._compute_loss(model, inputs)

    rollout = settings.batch // settings.micro_batch
    arguments = _engine(
        GRPOConfig,
        settings,
        seed,
        "grpo",
        folder,
        num_generations=settings.generations,
        num_iterations=settings.iterations,
        steps_per_generation=rollout,
        max_completion_length=settings.max_new_tokens,
        loss_type="grpo",
        epsilon=settings.epsilon,
        beta=0.0,
        temperature=1.0,
    )
    return Noting(model=model, args=arguments, train_dataset=Dataset.from_list(rows), reward_funcs=rewards, **shared)


class _Keeper(TrainerCallback):
    """Keeps the models that are due, and beside the last one what training goes on from; writes the log."""

    def __init__(self, folder: Path, due: Sequence[int], flat: FlatWeights | None, say: Say) -> None:
        self._folder, self._due, self._flat, self._say = folder, set(due), flat, say

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self._due
        self._say(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = checkpoints(self._folder)
        if self._flat is not None:
            self._flat.save(found[state.global_step])
        for step, path in found.items():
            # of the last model nothing goes on
            if step < state.global_step or step == state.max_steps:
                for name in _STATE:
                    for file in path.glob(f"{name}*"):
                        file.unlink()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"update {state.global_step}: the loss is {logs['loss']}; a lower learning rate?")
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        whole.add_line(self._folder / "training.jsonl", {"step": state.global_step, **numbers})
