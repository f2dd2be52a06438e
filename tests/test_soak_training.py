"""A thousand steps of training: what a process holds does not grow, alone and as one of two ranks."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed as dist
from transformers import TrainerCallback

from fused_po import losses, splits
from tests.forked import on_ranks
from tests.test_preference_trainer import rows, trainer_of

STEPS, EVERY = 1000, 100
# MiB between the fourth hundred of steps and the last; the first fill caches and the allocator's arenas
MOST = 8


class Held(TrainerCallback):
    """Resident memory in MiB and the number of tensors, after each hundred steps."""

    def __init__(self) -> None:
        self.sizes: list[float] = []
        self.tensors: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step % EVERY == 0:
            gc.collect()
            self.sizes.append(psutil.Process().memory_info().rss / 2**20)
            self.tensors.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))

    def check(self) -> None:
        assert len(self.sizes) == STEPS // EVERY
        assert self.sizes[-1] - self.sizes[3] < MOST, f"MiB after each hundred steps: {self.sizes}"
        assert self.tensors[-1] == self.tensors[3], self.tensors


def train(folder: Path, name: str, **options: Any) -> None:
    """With evaluations and checkpoints on the way, rows of many lengths, and a split that moves."""
    held, loss = Held(), losses.create(name)
    split = splits.controlled_dpo() if name == "sigmoid" else None
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 10, "optim": "adamw_torch"}
    settings |= {"learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 150, "save_total_limit": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 70, "split": split, "callbacks": [held]}
    trainer_of(folder, loss, rows(60), rows(5, seed=1), **settings, **options).train()
    held.check()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_training_does_not_grow(tmp_path, name):
    train(tmp_path, name, gradient_accumulation_steps=2)


def on_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    train(Path(folder), "sigmoid")
    dist.barrier()


@pytest.mark.nightly
def test_two_ranks_do_not_grow(tmp_path):
    on_ranks(on_rank, 2, tmp_path, str(tmp_path))
