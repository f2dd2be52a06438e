"""AsyncGRPO of TRL, with answers that are there already and attention in plain PyTorch in place of a server's and a
GPU's.
"""

from __future__ import annotations

import queue
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
pytest.importorskip("aiohttp", reason="AsyncGRPO talks to a server with aiohttp")

from datasets import Dataset
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from fused_po.trainers import trl as hooks
from tests.trainers.trl_runs import STEPS, TOKENIZER, assert_same, perturbed, tiny

GENERATIONS = 4


class Worker:
    """Puts all answers into the queue at the start."""

    def __init__(self, samples: list[RolloutSample]) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        self.samples = samples

    def start(self) -> None:
        for sample in self.samples:
            self.rollout_buffer.put(sample)

    def stop(self) -> None: ...

    def update_model_version(self, model_version: int) -> None: ...

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("too few answers were put into the queue")


class NoTransfer:
    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Any) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def attention(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any, **options: Any) -> Tensor:
    """(N, heads, D) of segments; a query sees its segment's keys up to its own place from the end."""
    parts = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, seen, scale=options["softmax_scale"], enable_gqa=True
        )
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


def samples(seed: int = 0) -> list[RolloutSample]:
    """Groups of answers of other lengths to one prompt, as a policy near the one that is trained gave them."""
    random = np.random.default_rng(seed)
    found = []
    for group in range(STEPS * 2):
        prompt = random.integers(3, len(TOKENIZER), 6)
        for _ in range(GENERATIONS):
            answer = random.integers(3, len(TOKENIZER), random.integers(3, 9))
            count = len(answer)
            found.append(
                RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=np.concatenate([prompt, answer]),
                    completion_mask=np.array([0] * len(prompt) + [1] * count),
                    old_log_probs=np.concatenate([np.zeros(len(prompt)), -4.5 + 0.3 * random.standard_normal(count)]),
                    advantage=float(random.standard_normal()),
                    model_version=0,
                    group_id=group,
                    metrics={"reward": 0.0},
                )
            )
    return found


def run(folder: Any, enable: bool) -> list[dict[str, float]]:
    config = AsyncGRPOConfig(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        per_device_train_batch_size=GENERATIONS,
        num_generations=GENERATIONS,
        temperature=0.9,
        token_budget=0,
        max_staleness=100,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    with hooks.enable() if enable else nullcontext():
        made = AsyncGRPOTrainer(
            model=str(folder / "policy"),
            args=config,
            # the answers are there: nobody asks for those of other prompts
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "say"}]}]),
            processing_class=TOKENIZER,
            rollout_worker=Worker(samples()),
            weight_transfer=NoTransfer(),
        )
        made.train()
        assert hooks.calls() == (STEPS if enable else 0)
    return [entry for entry in made.state.log_history if "loss" in entry]


def test_async_grpo(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: None)
    # of the throughput in the log, by the name of the GPU
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    perturbed(tiny()).save_pretrained(tmp_path / "policy")
    theirs, ours = run(tmp_path, False), run(tmp_path, True)
    for entry in (*theirs, *ours):
        # times, and what follows from them
        for name in [name for name in entry if name.startswith(("perf/", "sample/"))]:
            del entry[name]
    assert {"kl", "entropy", "ratio", "grad_norm"} <= theirs[0].keys()
    assert_same(ours, theirs)
