"""Five steps of TRL's trainers under DeepSpeed ZeRO-3, as they are, after ``trl.enable()`` and in one pass:
``torchrun --nproc-per-node 2 tests/oracles/compare_zero3.py`` from the repository, on a CPU.

A script and not a test, since DeepSpeed is built from source and is no requirement of ours. No weight is whole outside
of DeepSpeed's own contexts here: nothing is small enough to persist, nothing is fetched ahead. It prints the largest
relative difference of losses and of gradient norms, and fails where a loss differs by 1e-5 or a norm by 1e-4.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate.state import DistributedType, PartialState
from torch import distributed as dist
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from fused_po.trainers import trl as hooks
from tests.trainers import test_trl_on_logits as on_logits
from tests.trainers.trl_runs import assert_same, run

ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
# kind, TRL's trainer, ours, settings
CASES: dict[str, tuple[str, type, type | None, dict[str, Any]]] = {
    "dpo": ("dpo", DPOTrainer, hooks.FusedDPOTrainer, {}),
    "dpo recomputed": ("dpo", DPOTrainer, hooks.FusedDPOTrainer, {"gradient_checkpointing": True}),
    "dpo accumulated": ("dpo", DPOTrainer, hooks.FusedDPOTrainer, {"gradient_accumulation_steps": 2}),
    "wpo": ("dpo", DPOTrainer, hooks.FusedDPOTrainer, {"use_weighting": True}),
    "lora": ("dpo", DPOTrainer, hooks.FusedDPOTrainer, {"lora": True}),
    "kto": ("kto", KTOTrainer, hooks.FusedKTOTrainer, {}),
    "grpo": ("grpo", GRPOTrainer, hooks.FusedGRPOTrainer, {}),
    "grpo entropy": ("grpo", GRPOTrainer, hooks.FusedGRPOTrainer, {"entropy_coef": 0.01}),
    "rloo": ("rloo", RLOOTrainer, None, {"beta": 0.0}),
    "sft": ("sft", SFTTrainer, None, {}),
}
# trainers that ask the model for logits, in any TRL
LOGITS: dict[str, tuple[str, dict[str, Any]]] = {
    "orpo": ("orpo", {}),
    "orpo accumulated": ("orpo", {"gradient_accumulation_steps": 2}),
    "cpo": ("cpo", {"loss_type": "sigmoid"}),
    "simpo, lora": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "lora": True}),
}


def on_cpu(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    """accelerate takes DeepSpeed for a matter of accelerators alone, DeepSpeed itself does not."""
    return "gloo", DistributedType.MULTI_CPU


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() > 1, "one rank shards nothing: use torchrun --nproc-per-node 2"
    PartialState._prepare_backend = on_cpu
    folder = Path(tempfile.mkdtemp())
    for name, (kind, theirs, ours, settings) in CASES.items():
        options = {"deepspeed": ZERO_3, "use_cpu": False, **settings}
        want = run(kind, theirs, folder, **options)
        found = {"enable": run(kind, theirs, folder, enable=True, **options)}
        if ours is not None:
            found["one pass"] = run(kind, ours, folder, **options)
        for way, steps in found.items():
            compare(f"{name}, {way}", steps, want)
    for name, (kind, settings) in LOGITS.items():
        options = {"deepspeed": ZERO_3, "use_cpu": False, **settings}
        want, _ = on_logits.run(kind, folder, False, **options)
        steps, calls = on_logits.run(kind, folder, True, **options)
        assert calls >= len(steps), "the logits were made"
        compare(f"{name}, on logits", steps, want)
    dist.destroy_process_group()


def compare(name: str, steps: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert_same(steps, want)
    worst = {
        key: max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-2) for a, b in zip(steps, want, strict=True))
        for key in ("loss", "grad_norm")
    }
    if dist.get_rank() == 0:
        print(f"{name}: loss {worst['loss']:.1e}, gradient norm {worst['grad_norm']:.1e}")


if __name__ == "__main__":
    main()
