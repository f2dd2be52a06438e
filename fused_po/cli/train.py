"""``fused-po train``: from preferences to a trained model."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_po.cli.arguments import positive

__all__ = ["add_parser", "content_of", "loss_of", "with_config"]

INTERRUPTED = 130
_DATA = Path(__file__).parents[1] / "data"
# what must not change between a run and its continuation
_FIXED = (
    *("model", "data", "loss", "beta", "loss_arg", "split", "split_arg", "batch_size", "lr", "seed", "lora"),
    *("max_length", "on_too_long", "dtype", "streaming"),
)
_FIXED_OF_ENGINE = ("gradient_accumulation_steps", "world_size", "data_seed")
# flags of the engine that say what one of ours says
_OURS = {
    "--output-dir": "--output",
    "--max-steps": "--steps",
    "--per-device-train-batch-size": "--batch-size",
    "--learning-rate": "--lr",
    "--eval-steps": "--eval-every",
    "--save-steps": "--save-every",
    "--resume-from-checkpoint": "--resume",
    "--use-cpu": "--device cpu",
}
_EPILOG = """\
Losses on pairs (sigmoid, ipo, simpo, ...) take a pair as it is; those on single answers (kto, bco, ...) take its two
answers as desirable and undesirable, or files with completion and label; sft learns the chosen answer; policy losses
(ppo, dapo, ...) take an advantage of +1 on chosen and -1 on rejected answers, with the starting policy as the old one.
The reference is the starting policy. docs/losses.md lists all. Every field of transformers' TrainingArguments is a flag
too (--gradient-accumulation-steps 8, --deepspeed ds.json, --report-to tensorboard). On several processes:
accelerate launch -m fused_po train ...
"""


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    words = "train a causal language model on preferences"
    parser = commands.add_parser("train", help=words, epilog=_EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="tiny", help="a folder or hub id of transformers, or 'tiny': a small random Llama (default)")
    add("--data", help="JSONL, JSON, CSV, parquet, a saved folder or a hub id; default: a small set that is shipped")
    add("--eval-data", help="held-out preferences; default: none, or those shipped with the set")
    add("--loss", default="sigmoid", help="a registered loss, default sigmoid (DPO); several: sigmoid+sft")
    add("--beta", type=float, help="the loss's beta, default its own")
    add("--loss-arg", action="append", default=[], metavar="NAME=VALUE", help="another hyper-parameter; repeatable")
    add("--split", help="a preset of fused_po.splits, such as controlled_dpo; default: none")
    add("--split-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it; repeatable")
    add("--steps", type=positive(int), help="optimizer steps, default 60")
    add("--batch-size", type=positive(int), default=4, help="rows a step and process, default 4")
    add("--lr", type=positive(float), default=1e-4, help="peak learning rate of AdamW, default 1e-4")
    add("--seed", type=int, default=0, help="of the tiny model, adapters and the order of rows, default 0")
    add("--lora", type=positive(int), metavar="R", help="train a LoRA adapter of this rank; the head stays frozen")
    add("--max-length", type=positive(int), default=1024, help="tokens of prompt and answer together, default 1024")
    add(
        "--on-too-long",
        choices=("truncate", "refuse"),
        default="truncate",
        help="cut longer rows on the right, or stop",
    )
    add("--streaming", action="store_true", help="read only as many rows of --data as the steps take")
    add("--num-proc", type=positive(int), metavar="N", help="processes that tokenize")
    add("--eval-every", type=positive(int), default=20, metavar="N", help="steps between evaluations, default 20")
    add("--save-every", type=positive(int), default=50, metavar="N", help="steps between checkpoints, default 50")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast, weights stay float32")
    add("--compare", action="store_true", help="also take every step through full logits; exit 1 if the two disagree")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output")
    add("--config", metavar="FILE", help="YAML with any of these flags; the command line wins")
    add("--output", type=Path, help="a new or empty folder")
    parser.set_defaults(run=run)


def with_config(argv: Sequence[str]) -> list[str]:
    """The command line with the flags of its ``--config`` file in front."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?")
    path = finder.parse_known_args(argv)[0].config
    if path is None or argv[0] != "train":
        return list(argv)
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: a mapping of flags is wanted, got {type(found).__name__}")
    flags: list[str] = []
    for name, value in found.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag in ("--loss-arg", "--split-arg") and isinstance(value, dict):
            flags += [part for key, one in value.items() for part in (flag, f"{key}={one}")]
        elif flag in ("--streaming", "--compare", "--resume"):
            flags += [flag] * bool(value)
        elif value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [flag, *map(str, values)]
    return ["train", *flags, *argv[1:]]


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, then train.

    Returns:
        0, 1 where the two paths of ``--compare`` disagree, 130 after Ctrl-C.

    Raises:
        ValueError: whatever can't be trained, before anything is written.
        FloatingPointError: the training diverged.
    """
    if arguments.data is None:
        arguments.data = str(_DATA / "preferences.jsonl")
        arguments.eval_data = arguments.eval_data or str(_DATA / "preferences_eval.jsonl")
    if arguments.output is None:
        raise ValueError("--output is wanted: a new or empty folder")
    if arguments.compare and arguments.dtype != "float32":
        raise ValueError(
            "--compare needs --dtype float32: in bfloat16 the plain path rounds its logits and must differ"
        )
    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; --output wants a folder")
    if arguments.resume and not (output / "settings.json").is_file():
        raise ValueError(f"nothing to resume: {output} holds no run")
    if not arguments.resume and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty: choose another folder, or --resume to continue in it")
    try:
        # torch and transformers take seconds to import; a wrong argument should not
        return _train(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _train(arguments: argparse.Namespace) -> int:
    import datasets
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from fused_po import splits
    from fused_po.cli.report import Report, plot, read_log
    from fused_po.trainers import loading
    from fused_po.trainers.data import counted, load_preferences, texts
    from fused_po.trainers.preferences import PreferenceTrainer, check_trainable, learns_single

    args, output = _engine(arguments), Path(arguments.output)
    if not sys.stderr.isatty() or not args.should_save:
        datasets.disable_progress_bars()
    loss = loss_of(arguments)
    check_trainable(loss)
    split = None
    if arguments.split is not None:
        presets = {name: getattr(splits, name) for name in splits.__all__}
        presets = {name: make for name, make in presets.items() if make.__annotations__.get("return") == "Split"}
        presets["split"] = splits.Split
        if arguments.split not in presets:
            raise ValueError(f"--split {arguments.split}: expected one of {', '.join(sorted(presets))}")
        split = _called(presets[arguments.split], "--split", named_values("--split-arg", arguments.split_arg))
    rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
    if arguments.streaming and rows <= 0:
        raise ValueError("--streaming wants --steps: it reads as many rows as they take")
    stream = rows if arguments.streaming else None
    files = [one for one in (arguments.data, arguments.eval_data) if one is not None]
    tokenizer = loading.load_tokenizer(arguments.model, texts(files[0], stream))
    model = loading.load_model(arguments.model, tokenizer, arguments.seed)
    limit = min(arguments.max_length, getattr(model.config, "max_position_embeddings", None) or arguments.max_length)
    options = {"single": learns_single(loss), "on_too_long": arguments.on_too_long, "num_proc": arguments.num_proc}
    options |= {"max_length": limit, "vocabulary": model.get_input_embeddings().weight.shape[0]}
    # the others read what it cached
    with args.main_process_first():
        data = [
            load_preferences(one, tokenizer, rows=None if number else stream, **options)
            for number, one in enumerate(files)
        ]
    model = loading.add_adapter(model, arguments.lora, arguments.seed) if arguments.lora else model
    checkpoint = _checkpoint(arguments, args) if arguments.resume else None
    kind: Any = PreferenceTrainer
    if arguments.compare:
        if args.bf16 or args.fp16:
            raise ValueError("--compare needs float32: neither --bf16 nor --fp16")
        if args.world_size > 1 or args.gradient_accumulation_steps > 1 or split is not None:
            raise ValueError("--compare takes one process, --gradient-accumulation-steps 1 and no --split")
        from fused_po.cli.compare import ComparedTrainer as kind
    trainer = kind(
        model,
        args,
        data[0].rows,
        data[1].rows if len(data) > 1 else None,
        loss=loss,
        split=split,
        processing_class=tokenizer,
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    log = output / "metrics.jsonl"
    report = Report(log, trainer.accelerator)
    trainer.add_callback(report)
    for name, found in zip(files, data, strict=True):
        noticed = [f"read as {found.layout}"] * bool(found.layout)
        noticed += [counted(found.counts)] * bool(found.counts)
        report.console.print(
            f"{Path(name).name}: {len(found.rows)} rows" + (f" ({', '.join(noticed)})" if noticed else "")
        )
    if tokenizer.eos_token is None:
        report.console.print("the tokenizer has no end token: answers end where their text does")
    if args.should_save:
        if checkpoint is None:
            settings = json.dumps(_settings(arguments, args), indent=2)
            (output / "settings.json").write_text(settings + "\n", encoding="utf-8")
        step = -1 if checkpoint is None else int(checkpoint.rpartition("-")[2])
        kept = [row for row in read_log(log) if row["step"] <= step]
        log.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    with report:
        trainer.train(resume_from_checkpoint=checkpoint)
    if report.interrupted and trainer.state.global_step < trainer.state.max_steps:
        step = trainer.state.global_step
        if args.should_save:
            plot(log, output / "metrics.png", loss.name)
        report.console.print(f"stopped after step {step}: the same command with --resume continues")
        return INTERRUPTED
    code = trainer.report(output, report.console) if arguments.compare else 0
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(inner, "merge_and_unload") and not trainer.is_fsdp_enabled:
        trainer.model = inner.merge_and_unload()
    trainer.save_model(str(output / "model"))
    if args.should_save:
        plot(log, output / "metrics.png", loss.name)
    drawn = ", metrics.png" if (output / "metrics.png").exists() else ""
    report.console.print(f"wrote {output}/metrics.jsonl{drawn} and model/")
    return code


def _engine(arguments: argparse.Namespace) -> Any:
    """transformers' ``TrainingArguments``: ours by its names, and what the command line says in them itself."""
    import torch
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.utils import logging

    # the run has words and a bar of its own
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if kind.index:
        raise ValueError(f"--device {device}: choose it by CUDA_VISIBLE_DEVICES={kind.index}")
    for one in arguments.rest:
        flag = one.partition("=")[0].replace("_", "-")
        if flag in _OURS:
            raise ValueError(f"{flag} is not taken: give {_OURS[flag]}")
    by_epochs = any(one.replace("_", "-").startswith("--num-train-epochs") for one in arguments.rest)
    steps = arguments.steps or (-1 if by_epochs else 60)
    begun = arguments.resume and any(arguments.output.glob("checkpoint-*"))
    kind_of: Any = TrainingArguments
    parser = HfArgumentParser(kind_of, prog="fused-po train", usage="see --help", allow_abbrev=False)
    parser.set_defaults(
        output_dir=str(arguments.output),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(0, steps) // 10,
        seed=arguments.seed,
        bf16=arguments.dtype == "bfloat16",
        use_cpu=kind.type == "cpu",
        dataloader_pin_memory=kind.type != "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        eval_strategy="no" if arguments.eval_data is None else "steps",
        eval_steps=arguments.eval_every,
        eval_on_start=arguments.eval_data is not None and not begun,
        save_steps=arguments.save_every,
        save_total_limit=1,
    )
    args, rest = parser.parse_args_into_dataclasses(arguments.rest, True, look_for_args_file=False)
    if rest:
        raise ValueError(f"unknown arguments: {' '.join(rest)} (neither of fused-po train nor of TrainingArguments)")
    return args


def loss_of(arguments: argparse.Namespace) -> Any:
    """The loss that ``--loss``, ``--beta`` and ``--loss-arg`` name."""
    from fused_po import losses

    names = arguments.loss.split("+")
    given = named_values("--loss-arg", arguments.loss_arg)
    given |= {} if arguments.beta is None else {"beta": arguments.beta}
    given |= {"paired": True} if names == ["sft"] else {}
    return losses.create(names if len(names) > 1 else names[0], **given)


def named_values(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as Python values, words as they are."""
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise ValueError(f"{flag} {one}: NAME=VALUE is wanted")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _called(make: Any, flag: str, given: dict[str, Any]) -> Any:
    try:
        return make(**given)
    except TypeError as error:
        raise ValueError(f"{flag}: {error}") from None


def _settings(arguments: argparse.Namespace, args: Any) -> dict[str, Any]:
    """What a continuation must have in common; a file and a folder count by their contents."""
    found = {name: getattr(arguments, name) for name in _FIXED}
    found |= {name: getattr(args, name) for name in _FIXED_OF_ENGINE}
    found["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    if arguments.streaming:
        # as many rows as they take are read, and put in order
        found["steps"] = args.max_steps
    path = Path(found["data"]).expanduser()
    if path.exists():
        found["data"] = content_of(path)
    return found


def content_of(path: Path) -> str:
    """A digest of a file, or of the files in a folder."""
    digest = hashlib.sha256()
    for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
        # datasets keeps its caches beside the rows
        if one.is_file() and (one is path or not one.name.startswith(("cache-", "."))):
            digest.update(b"" if one is path else one.relative_to(path).as_posix().encode())
            with one.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _checkpoint(arguments: argparse.Namespace, args: Any) -> str | None:
    """The last checkpoint of the run that ``--resume`` continues; None: it ended before the first one.

    Raises:
        ValueError: it can't be read, holds all steps, or belongs to a run with other arguments.
    """
    from transformers.trainer_utils import get_last_checkpoint

    output: Path = arguments.output
    found = get_last_checkpoint(str(output))
    before, now = json.loads((output / "settings.json").read_text(encoding="utf-8")), _settings(arguments, args)
    for name in before:
        if name == "data" and now[name] != before[name]:
            raise ValueError("--resume with other --data: its contents have changed")
        if now.get(name) != before[name]:
            flag = "number of processes" if name == "world_size" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--resume with another {flag}: {now.get(name)}, the run began with {before[name]}")
    steps = args.max_steps
    if found is None:
        return None
    step = int(found.rpartition("-")[2])
    if step >= steps > 0:
        raise ValueError(f"nothing to resume: {output} holds all {steps} steps; more --steps continue it")
    for path in Path(found).iterdir():
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} can't be read: it is not whole")
    return found
