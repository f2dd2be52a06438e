"""The command line, up to where the work would begin; the files that a continued run reads; YAML flags."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState

from fused_po.bench import paper_table, runner
from fused_po.cli import doctor, main, profile_measure, study, study_real
from fused_po.losses import names
from fused_po.study import real_run
from fused_po.trainers import loading
from tests.fuzz.readers.common import Draw, Target, check_sentence

__all__ = ["COMMAND"]

WORK = (
    (loading, "load_tokenizer"),
    (study, "run_all"),
    (study_real, "_report"),
    (real_run, "RealStudy"),
    (runner, "run_cases"),
    (paper_table, "report"),
    (doctor, "examine"),
    (profile_measure, "predictions"),
)


class Reached(BaseException):
    """The work begins."""


def reached(*given: Any, **named: Any) -> Any:
    raise Reached


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Whatever the engine leaves in the process is taken back, and no work begins."""
    before, place = dict(os.environ), os.getcwd()
    with contextlib.ExitStack() as stack:
        for module, name in WORK:
            stack.enter_context(mock.patch.object(module, name, reached))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
            os.chdir(place)
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()


def called(argv: list[str], folder: Path) -> None:
    """Run a command line in a folder: it reaches the work, or refuses in a sentence with exit code 2."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with unchanged(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        os.chdir(folder)
        try:
            code = main(argv)
        except Reached:
            return
        except SystemExit as stop:
            assert stop.code in (0, 2), f"exit code {stop.code}"
            # argparse's usage in front
            assert stop.code == 0 or "error: " in err.getvalue()
            return
    if code == 0:
        return
    assert code == 2, f"exit code {code}: {err.getvalue()}"
    said = [line for line in err.getvalue().splitlines() if line.startswith("fused-po: ")]
    assert len(said) == 1, err.getvalue()
    check_sentence(said[0])


FLAGS = {
    "train": (
        *("--model", "--data", "--eval-data", "--loss", "--beta", "--loss-arg", "--split", "--split-arg", "--steps"),
        *("--batch-size", "--lr", "--seed", "--lora", "--max-length", "--on-too-long", "--streaming", "--num-proc"),
        *("--eval-every", "--save-every", "--device", "--dtype", "--compare", "--resume", "--config", "--output"),
        *("--gradient-accumulation-steps", "--deepspeed", "--fsdp", "--fsdp-config", "--report-to", "--optim"),
        *("--bf16", "--fp16", "--lr-scheduler-type", "--lr-scheduler-kwargs", "--warmup-steps", "--max_grad_norm"),
        *("--save-strategy", "--eval-strategy", "--logging-steps", "--load-best-model-at-end", "--ddp-backend"),
        *("--accelerator-config", "--torch-compile", "--data-seed", "--neftune-noise-alpha", "--num-train-epochs"),
        *("--save-total-limit", "--gradient-checkpointing-kwargs", "--debug", "--dataloader-num-workers", "--tf32"),
        *("--optim-args", "--label-smoothing-factor", "--parallelism-config", "--learning-rate", "--nonsense"),
    ),
    "study": (
        *("--output", "--seeds", "--first-seed", "--workers", "--quick", "--model", "--policy-loss", "--estimator"),
        *("--device", "--steps", "--checkpoints", "--largest", "--samples", "--minibatches", "--noise", "--beta"),
        *(
            "--hidden-size",
            "--layers",
            "--epsilon",
            "--ppo-lr",
            "--pairs",
            "--batch",
            "--pool",
            "--data",
            "--eval-data",
        ),
        *("--reward", "--judge", "--method", "--arms", "--plan", "--dtype", "--held-out", "--final", "--optim"),
    ),
    "g": (
        *("--checkpoints", "--data", "--final", "--draws", "--loss", "--beta", "--loss-arg", "--parts", "--method"),
        *("--reference", "--examples", "--prompts", "--batch-size", "--max-length", "--max-new-tokens", "--lora-only"),
        *("--dtype", "--device", "--seed", "--count-memory", "--predict-only", "--resume", "--output"),
    ),
    "bench": (
        *("--cases", "--methods", "--device", "--seconds", "--stop-after", "--commit", "--output", "--paper"),
        *("--json", "--lines", "--list"),
    ),
    "profile": (
        *("--hidden", "--vocab", "--model", "--whole-step", "--frozen", "--lengths", "--gpu", "--predict-only"),
        *("--dtype", "--device", "--memory", "--scratch", "--seconds", "--snapshot", "--seed", "--output"),
    ),
    "doctor": ("--json", "--output"),
}
VALUES = (
    *(
        "0",
        "1",
        "2",
        "-1",
        "0.5",
        "1e-4",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "1_0",
        "٣",
        "99999999999999999999",
        "true",
        "no",
    ),
    *("", " ", "\x00", "\udcff", "{", "{}", '{"a": 1}', "[]", "[1,", "a=1", "a=", "=1", "a=(1,", "gamma=0.5", "'"),
    *("tiny", "/no/such", "./no", "~nobody/x", ".", "a/b/c", "sigmoid+sft", "sft", "++", "controlled_dpo", "psr"),
    *("cpu", "cuda", "cuda:1", "meta", "mps", "float32", "bfloat16", "h100", "quick", "*", "**[", "ours", "80GiB"),
    *("1e3GB", "steps", "epoch", "full_shard", "adamw_torch", "cosine", "wandb", "all", "none", "ppo", "exact"),
    *("truncate", "refuse", "%s", "%(prog)s", "negative=(0,1)", "x" * 300, "1" * 5000, "loss_weights=[1,0.2]"),
)


def argv(data: bytes, folder: Path) -> None:
    """Flags of a command with values that are nearly right."""
    draw = Draw(data)
    command = draw.one([*FLAGS, "train", "train"])
    made = folder / "made"
    made.mkdir()
    (folder / "file").write_bytes(
        draw.one([b"", b"{}", b"\xff\xfe", b"steps: 3\n", b"- a\n", b'{"a": [1', b"loss: {a: 1}"])
    )
    values = (*VALUES, *names()[:40], str(folder / "file"), str(made), str(folder / "new"))
    found = [command]
    if draw.number(4):
        found += ["--output", str(folder / "out")]
    while draw.count > 0 and len(found) < 24:
        found.append(draw.one(FLAGS[command]))
        found += [draw.one(values) for _ in range(draw.number(3))]
    called(found, folder)


def words(data: bytes, folder: Path) -> None:
    """Any words at all, one a line."""
    # as Python makes them of arguments that are no UTF-8
    called(os.fsdecode(data.replace(b"\x00", b"")).split("\n"), folder)


def config(data: bytes, folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_bytes(data)
    called(["train", "--config", str(path), "--output", str(folder / "out")], folder)


def run_of(folder: Path, settings: bytes) -> list[str]:
    """A run that can be continued, but for its settings."""
    output = folder / "out"
    output.mkdir(exist_ok=True)
    (output / "settings.json").write_bytes(settings)
    return ["train", "--output", str(output), "--steps", "4"]


def settings(data: bytes, folder: Path) -> None:
    """``settings.json`` of a run that is continued."""
    from fused_po.cli import train

    given = run_of(folder, data)

    def compared(arguments: Any, *told: Any) -> int:
        train._checkpoint(arguments, train._engine(arguments))
        raise Reached

    with mock.patch.object(train, "_train", compared):
        called([*given, "--resume"], folder)


YAML = b"""steps: 3
loss: simpo
loss_arg: {simpo_gamma: 0.5}
compare: true
lora:
fsdp_config: {a: 1}
bf16: true
data: [a, b]
"""
SETTINGS = json.dumps(
    {"model": "tiny", "loss": "sigmoid", "lr": 1e-4, "world_size": 1, "data_seed": 0, "split": None}
).encode()
FIRST = tuple(
    b"\n".join(word.encode() for word in line.split())
    for line in (
        "train --loss simpo --output x",
        "bench --paper h100 --cases a",
        "profile --hidden 8 --vocab 9",
        "doctor",
    )
)
COMMAND = {
    "argv": Target(
        argv, tuple(bytes([command, 0, 1, *range(seed, seed + 30)]) for command in range(7) for seed in (0, 9, 40))
    ),
    "words": Target(words, FIRST, tuple(flag for flags in FLAGS.values() for flag in flags)),
    "config": Target(
        config,
        (YAML, b"steps: [1, 2]\n", b"? {a: 1}\n: b\n", b"!!python/object:os.system {}\n", b"a: &a [*a]\n"),
        tuple(flag[2:] + ": " for flag in FLAGS["train"]),
    ),
    "settings": Target(settings, (SETTINGS, b"{}", b"[]", b"{"), ('"data"', '"world_size"', '"steps"', "null")),
}
