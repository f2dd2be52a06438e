"""``fused-po train``: from preferences to a trained model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from fused_po.cli.arguments import INTERRUPTED, positive
from fused_po.cli.objective import loss_of, split_of
from fused_po.cli.progress import Watch, watched
from fused_po.trainers.rows import shortened
from fused_po.trainers.whole import begun

__all__ = ["add_parser", "with_config"]

_DATA = Path(__file__).parents[1] / "data"
# what must not change between a run and its continuation, of our flags and of the engine's arguments
_FIXED = (
    *("model", "data", "loss", "beta", "loss_arg", "split", "split_arg", "lora", "max_length", "on_too_long", "dtype"),
    "streaming",
)
_FIXED_OF_ENGINE = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "learning_rate", "warmup_steps"),
    *("seed", "data_seed"),
)
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
    # by the names of the engine's arguments, where they have one
    flags = {"resume_from_checkpoint": "--resume", "use_cpu": "--device cpu"}

    def add(flag: str, **options: Any) -> None:
        flags[parser.add_argument(flag, **options).dest] = flag

    count = {"type": positive(int), "metavar": "N"}
    pairs: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("--model", default="tiny", help="a folder or hub id of transformers, or 'tiny': a small random Llama (default)")
    add("--data", help="JSONL, JSON, CSV, parquet, a saved folder or a hub id; default: a small set that is shipped")
    add("--eval-data", help="held-out preferences; default: none, or those shipped with the set")
    add("--loss", default="sigmoid", help="a registered loss, default sigmoid (DPO); several: sigmoid+sft")
    add("--beta", type=float, help="the loss's beta, default its own")
    add("--loss-arg", **pairs, help="another hyper-parameter; repeatable")
    add("--split", help="a preset of fused_po.splits, such as controlled_dpo; default: none")
    add("--split-arg", **pairs, help="an argument of it; repeatable")
    add("--steps", dest="max_steps", **count, help="optimizer steps, default 60")
    batch = {"dest": "per_device_train_batch_size", "default": 4, **count}
    add("--batch-size", **batch, help="rows a step and process, default 4")
    rate = {"dest": "learning_rate", "type": positive(float), "default": 1e-4}
    add("--lr", **rate, help="peak learning rate of AdamW, default 1e-4")
    add("--seed", type=int, default=0, help="of the tiny model, adapters and the order of rows, default 0")
    add("--lora", type=positive(int), metavar="R", help="train a LoRA adapter of this rank; the head stays frozen")
    add("--max-length", **count, default=1024, help="tokens of prompt and answer together, default 1024")
    long = {"choices": ("truncate", "refuse"), "default": "truncate"}
    add("--on-too-long", **long, help="cut longer rows on the right, or stop")
    add("--streaming", action="store_true", help="read only as many rows of --data as the steps take")
    add("--num-proc", **count, help="processes that tokenize")
    add("--eval-every", dest="eval_steps", **count, help="steps between evaluations, default 20")
    add("--save-every", dest="save_steps", **count, default=50, help="steps between checkpoints, default 50")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast, weights stay float32")
    add("--compare", action="store_true", help="also take every step through full logits; exit 1 if the two disagree")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output")
    add("--config", metavar="FILE", help="YAML with any of these flags; the command line wins")
    add("--output", dest="output_dir", type=Path, help="a new or empty folder")
    parser.set_defaults(run=run, flags=flags)


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
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        said = error.strerror if isinstance(error, OSError) else shortened(error)
        raise ValueError(f"--config {path}: {said}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: a mapping of flags is wanted, got {type(found).__name__}")
    flags: list[str] = []
    for name, value in found.items():
        flag = f"--{str(name).replace('_', '-')}"
        if flag in ("--loss-arg", "--split-arg") and isinstance(value, dict):
            flags += [part for key, one in value.items() for part in (flag, f"{key}={one}")]
        elif flag in ("--streaming", "--compare", "--resume"):
            if not isinstance(value, bool | None):
                raise ValueError(f"--config {path}: {name} must be true or false, got {shortened(repr(value), 60)}")
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
    if arguments.eval_steps is not None and arguments.eval_data is None:
        raise ValueError("--eval-every wants --eval-data")
    if arguments.output_dir is None:
        raise ValueError("--output is wanted: a new or empty folder")
    output: Path = arguments.output_dir
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; --output wants a folder")
    if arguments.resume and not (output / "settings.json").is_file():
        raise ValueError(f"nothing to resume: {output} holds no run")
    if not arguments.resume and begun(output):
        raise ValueError(f"{output} exists and is not empty: choose another folder, or --resume to continue in it")
    with ExitStack() as silence:
        shown = int(os.environ.get("RANK", "0")) == 0
        watch = silence.enter_context(watched("loading")) if shown else Watch("", lambda one: None)
        # torch and transformers take seconds to import; a wrong argument should not
        return _train(arguments, watch, silence)


def _train(arguments: argparse.Namespace, watch: Watch, silence: ExitStack) -> int:
    """Train; ``watch`` shows on stderr what is done until ``silence`` is closed."""
    import datasets
    from rich.console import Console
    from transformers import PrinterCallback, ProgressCallback, TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    from fused_po.cli.report import Bar, Report, plot, rows
    from fused_po.trainers import loading, whole
    from fused_po.trainers.data import counted, load_preferences, texts
    from fused_po.trainers.preferences import PreferenceTrainer, check_trainable, learns_single, reads_reference

    args, output = _engine(arguments), arguments.output_dir
    bar = Bar() if sys.stderr.isatty() and args.should_save else None
    if bar is None:
        datasets.disable_progress_bars()
    # what its readers say of a broken file is in our refusal
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    console = Console(quiet=not args.should_save)
    loss, split = loss_of(arguments), split_of(arguments)
    check_trainable(loss)
    if arguments.compare and (args.bf16 or args.fp16):
        raise ValueError("--compare needs float32: in 16 bits the plain path rounds its logits and must differ")
    if arguments.compare and (args.world_size > 1 or args.gradient_accumulation_steps > 1 or split is not None):
        raise ValueError("--compare takes one process, --gradient-accumulation-steps 1 and no --split")
    reached = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
    if arguments.streaming and reached <= 0:
        raise ValueError("--streaming wants --steps: it reads as many rows as they take")
    streamed = [reached if arguments.streaming else None, None]
    files = [one for one in (arguments.data, arguments.eval_data) if one is not None]
    tokenizer = loading.load_tokenizer(arguments.model, texts(files[0], streamed[0]))
    watch.say("loading the model")
    model = loading.load_model(arguments.model, tokenizer, arguments.seed)
    if bar is not None:
        # datasets has bars of its own
        silence.close()
    watch.say("reading the data")
    limit = min(arguments.max_length, getattr(model.config, "max_position_embeddings", None) or arguments.max_length)
    options = {"single": learns_single(loss), "on_too_long": arguments.on_too_long, "num_proc": arguments.num_proc}
    options |= {"max_length": limit, "vocabulary": model.get_input_embeddings().weight.shape[0]}
    # the others read what it cached
    with args.main_process_first():
        data = [load_preferences(one, tokenizer, rows=n, **options) for one, n in zip(files, streamed, strict=False)]
    model = loading.add_adapter(model, arguments.lora, arguments.seed) if arguments.lora else model
    checkpoint = _checkpoint(arguments, args) if arguments.resume else None
    kind: Any = PreferenceTrainer
    if arguments.compare:
        from fused_po.cli.compare import ComparedTrainer as kind
    held_out = data[1].rows if len(data) > 1 else None
    watch.say("asking the reference")
    # what the hub's client raises has no common base
    with whole.writing(f"{args.hub_model_id or output.name} on the hub") if args.push_to_hub else nullcontext():
        trainer = kind(model, args, data[0].rows, held_out, loss=loss, split=split, processing_class=tokenizer)
    silence.close()
    report = Report(output / "metrics.jsonl", trainer.accelerator, bar)
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    for callback in (report,) if bar is None else (bar, report):
        trainer.add_callback(callback)
    for name, found in zip(files, data, strict=True):
        noticed = [f"read as {found.layout}"] * bool(found.layout) + [counted(found.counts)] * bool(found.counts)
        count = f"{len(found.rows)} {'row' if len(found.rows) == 1 else 'rows'}"
        console.print(f"{Path(name).name}: {count}" + (f" ({', '.join(noticed)})" if noticed else ""))
    if reads_reference(loss):
        console.print(f"reference log-probs: {'computed' if trainer.reference_rows else 'from the cache'}")
    if tokenizer.eos_token is None:
        console.print("the tokenizer has no end token: answers end where their text does")
    if args.should_save and checkpoint is None:
        whole.write_text(output / "settings.json", json.dumps(_settings(arguments, args), indent=2) + "\n")
    if checkpoint is not None and _step(checkpoint) == args.max_steps:
        # what ended before model/ was there has no step left
        shutil.rmtree(output / ".incomplete", ignore_errors=True)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    else:
        with report:
            trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if args.should_save:
        plot(rows(state.log_history), output / "metrics.png", loss.name)
    if report.interrupted and state.global_step < state.max_steps:
        console.print(f"stopped after step {state.global_step}: the same command with --resume continues")
        return INTERRUPTED
    code = trainer.report(output, console) if arguments.compare else 0
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(inner, "merge_and_unload") and not trainer.is_fsdp_enabled:
        trainer.model = inner.merge_and_unload()
    aside = whole.unfinished(output / "model")
    with whole.writing("model/"):
        trainer.save_model(str(aside))
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        state.save_to_json(str(aside / TRAINER_STATE_NAME))
        whole.put(output / "model")
    drawn = ", metrics.png" if (output / "metrics.png").exists() else ""
    console.print(f"wrote {output}/metrics.jsonl{drawn} and model/")
    return code


def _engine(arguments: argparse.Namespace) -> Any:
    """transformers' ``TrainingArguments``: ours by its names, and what the command line says in them itself."""
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.utils import logging

    from fused_po.trainers.loading import device_of

    # of flags that the installed version has and a later one will not
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # the run has words and a bar of its own
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind = device_of(arguments.device)
    if kind.index:
        raise ValueError(f"--device {kind}: choose it by CUDA_VISIBLE_DEVICES={kind.index}")
    flags = [one for one in arguments.rest if one.startswith("--")]
    named = [one.partition("=")[0].removeprefix("--").replace("-", "_") for one in flags]
    for name in named:
        if name in arguments.flags:
            raise ValueError(f"--{name.replace('_', '-')} is not taken: give {arguments.flags[name]}")
    steps = arguments.max_steps or (-1 if "num_train_epochs" in named else 60)
    evaluates, output = arguments.eval_data is not None, arguments.output_dir
    # a run that is continued keeps the warm-up that it began with
    begun = _written(output / "settings.json") if arguments.resume else {}
    kind_of: Any = TrainingArguments
    parser = HfArgumentParser(kind_of, prog="fused-po train", usage="see --help", allow_abbrev=False)
    fields = TrainingArguments.__dataclass_fields__
    ours = {name: value for name, value in vars(arguments).items() if name in fields and value is not None}
    own = {
        "eval_steps": arguments.eval_steps or 20,
        "output_dir": str(output),
        "max_steps": steps,
        "warmup_steps": max(0, steps) // 10,
        "per_device_eval_batch_size": arguments.per_device_train_batch_size,
        "lr_scheduler_type": "constant_with_warmup",
        "bf16": arguments.dtype == "bfloat16",
        "use_cpu": kind.type == "cpu",
        "dataloader_pin_memory": kind.type != "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "save_total_limit": 1,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_on_start": evaluates and not (arguments.resume and any(output.glob("checkpoint-*"))),
    }
    parser.set_defaults(**ours | own | {name: value for name, value in begun.items() if name == "warmup_steps"})
    try:
        args, rest = parser.parse_args_into_dataclasses(arguments.rest, True, look_for_args_file=False)
    except Exception as error:
        # of a package that is not there, a file that is none, ...: it has no common base
        raise ValueError(f"arguments of the engine: {shortened(error, 300)}") from None
    if rest:
        raise ValueError(f"unknown arguments: {' '.join(rest)} (neither of fused-po train nor of TrainingArguments)")
    if not evaluates and args.eval_strategy != "no":
        raise ValueError("--eval-strategy wants --eval-data")
    if kind.type == "cpu" and (args.fp16 or args.use_liger_kernel):
        raise ValueError(f"{'--fp16' if args.fp16 else '--use-liger-kernel'} needs a GPU")
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    return args


def _settings(arguments: argparse.Namespace, args: Any) -> dict[str, Any]:
    """What a continuation must have in common; a file and a folder count by their contents."""
    from fused_po.trainers.data import contents

    found = {name: getattr(arguments, name) for name in _FIXED} | {
        name: getattr(args, name) for name in _FIXED_OF_ENGINE
    }
    # as many rows as the steps take are read, and put in order
    found |= {"max_steps": args.max_steps} if arguments.streaming else {}
    return found | {"data": contents(arguments.data) or arguments.data}


def _written(path: Path) -> dict[str, Any]:
    """What a run wrote as JSON: its settings, or the state that its model was saved in."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("warmup_steps", 0), int | float):
        raise ValueError(f"{path} can't be read: it is not what a run writes")
    return found


def _checkpoint(arguments: argparse.Namespace, args: Any) -> str | None:
    """The last checkpoint of the run that ``--resume`` continues; None: it ended before the first one.

    Raises:
        ValueError: it can't be read, has taken all steps, or belongs to a run with other arguments.
    """
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_utils import get_last_checkpoint

    output: Path = arguments.output_dir
    now = _settings(arguments, args)
    for name, before in _written(output / "settings.json").items():
        if name == "data" and now[name] != before:
            raise ValueError("--resume with other --data: its contents have changed")
        if now.get(name) != before:
            flag = arguments.flags.get(name, f"--{name.replace('_', '-')}")
            flag = "number of processes" if name == "world_size" else flag
            raise ValueError(f"--resume with another {flag}: {now.get(name)}, the run began with {before}")
    found, steps = get_last_checkpoint(str(output)), args.max_steps
    if found is None:
        return None
    step, state = _step(found), output / "model" / TRAINER_STATE_NAME
    done = _written(state).get("global_step") if state.exists() else None
    if step > steps > 0 or step == steps == done:
        raise ValueError(f"nothing to resume: {output} has taken {step} steps; --steps above that continue it")
    for path in Path(found).iterdir():
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} can't be read: it is not whole")
    return found


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])
