"""``fused-po train`` on two processes that share its weights or states, beside one process, on a CPU:

    torchrun --nproc-per-node 2 tests/oracles/compare_sharded_train.py zero2
    torchrun --nproc-per-node 2 tests/oracles/compare_sharded_train.py fsdp2

from the repository. DeepSpeed is built from source and is no requirement of ours; FSDP2 a test runs, too. Each loss is
trained in steps of two micro-batches of two rows, one row a process, and again with an end after half of the steps and
resumed from its checkpoint. It prints the largest relative difference of what is logged and of the weights of
``model/`` and of the last checkpoint, and fails where one is over 1e-4 or 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from accelerate.state import DistributedType, PartialState
from torch import distributed as dist
from transformers import AutoModelForCausalLM, TrainingArguments

from fused_po.cli import main as fused_po
from tests.test_train import WORDS, small_model

ROOT = Path(__file__).resolve().parents[2]
ZERO_2 = {
    # small buckets: several of them
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
FSDP_2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}
SHARDING = {"zero2": ZERO_2, "fsdp2": FSDP_2}
FLAGS = {"zero2": ["--deepspeed"], "fsdp2": ["--fsdp", "full_shard auto_wrap", "--fsdp-config"]}
CASES: dict[str, list[str]] = {
    "sigmoid": [],
    "sigmoid, clipped": ["--loss", "sigmoid", "--max-grad-norm", "0.1"],
    "kto": ["--loss", "kto"],
    "dapo": ["--loss", "dapo"],
    "sft": ["--loss", "sft"],
    "ipo, lora": ["--loss", "ipo", "--lora", "4", "--lr", "1e-2"],
}
STEPS = 6
MOST_LOGGED, MOST_WEIGHTS = 1e-4, 1e-5


def take_cpu(kind: str) -> None:
    """accelerate takes sharding for a matter of accelerators alone: a CPU then passes for one."""
    found = DistributedType.MULTI_CPU if kind == "zero2" else DistributedType.MULTI_GPU
    PartialState._prepare_backend = lambda *_, **__: ("gloo", found)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    before = TrainingArguments.__post_init__

    def made(self: TrainingArguments) -> None:
        self.use_cpu = False
        before(self)

    TrainingArguments.__post_init__ = made


def write(folder: Path) -> list[str]:
    """The files of a run, and its arguments."""
    rows = [
        {
            "prompt": f"Is it {word}?" + " Really?" * (index % 3),
            "chosen": f"Yes, it is {word}." + " Sure." * (index % 4),
            "rejected": "Go away now." * (1 + index % 2),
        }
        for index, word in enumerate(WORDS + WORDS[:2])
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in SHARDING.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return [
        *("train", "--model", small_model(folder), "--data", str(folder / "pairs.jsonl"), "--lr", "1e-3"),
        *("--eval-data", str(folder / "pairs.jsonl"), "--eval-every", "3", "--save-every", "3", "--device", "cpu"),
    ]


def alone(arguments: list[str]) -> None:
    """A run on one process, which knows nothing of the others."""
    known = ("RANK", "WORLD_SIZE", "MASTER", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC", "ACCELERATE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(known)}
    subprocess.run([sys.executable, "-m", "fused_po", *arguments], cwd=ROOT, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SHARDING)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2, "use torchrun --nproc-per-node 2"
    take_cpu(arguments.kind)
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    common = write(folder) if dist.get_rank() == 0 else []
    sent = [common]
    dist.broadcast_object_list(sent)
    accumulated = ["--gradient-accumulation-steps", "2"]
    sharded = [*sent[0], "--batch-size", "1", *accumulated]
    sharded += [*FLAGS[arguments.kind], str(folder / f"{arguments.kind}.json")]
    for number, name in enumerate(arguments.cases):
        more = CASES[name]
        outputs = [folder / f"{number}-{way}" for way in ("one", "sharded", "resumed")]
        one, whole, again = (["--output", str(output), *more] for output in outputs)
        if dist.get_rank() == 0:
            alone([*common, "--batch-size", "2", *accumulated, "--steps", str(STEPS), *one])
        dist.barrier()
        for steps, given in ((STEPS, whole), (STEPS // 2, again), (STEPS, [*again, "--resume"])):
            code = fused_po([*sharded, "--steps", str(steps), *given])
            assert code == 0, (name, given, code)
            dist.barrier()
        if dist.get_rank() == 0:
            for output in outputs[1:]:
                compare(f"{name}, {output.name.partition('-')[2]}", output, outputs[0])
    dist.destroy_process_group()


def compare(name: str, output: Path, wanted: Path) -> None:
    found, want = (
        [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (output, wanted)
    )
    # extremes are those of a call, and another engine clips
    numbers = {
        key for row in want for key, value in row.items() if isinstance(value, float) and "clip_ratio" not in key
    }
    assert [(row["step"], row["split"]) for row in found] == [(row["step"], row["split"]) for row in want]
    logged, worst = max(
        (abs(row[key] - other[key]) / max(abs(other[key]), 0.1), f"{key} of step {row['step']}")
        for row, other in zip(found, want, strict=True)
        for key in numbers & other.keys()
        # of a policy that is still the reference, rounding decides
        if key != "rewards/accuracies" or abs(other["rewards/margins"]) > 1e-4
    )
    ours, theirs = (AutoModelForCausalLM.from_pretrained(one / "model").state_dict() for one in (output, wanted))
    weights = max(float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs)
    print(f"{name}: logged {logged:.1e} ({worst}), weights {weights:.1e}", flush=True)
    assert logged <= MOST_LOGGED and weights <= MOST_WEIGHTS, name


if __name__ == "__main__":
    main()
