"""``fused-po study --model ID --data FILE``: the study's arms on a pretrained model and preference pairs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fused_po.cli.arguments import INTERRUPTED, command_of, positive
from fused_po.cli.progress import Watch
from fused_po.trainers.whole import begun

__all__ = ["add_flags", "run"]

# of a pretrained model: what its seeds differ in is the order of rows, adapters and what is drawn
SEEDS = 3


def add_flags(parser: Any) -> None:
    """The flags of a study on a pretrained model."""
    add = parser.add_argument_group(
        "with --data, on a pretrained --model",
        "A folder for each seed, method and arm holds its numbers as they come; the same command goes on with what is "
        "left. --pool joins runs of other machines; without --data it makes their report and nothing else.",
    ).add_argument
    add("--data", metavar="FILE", help="preference pairs, as fused-po train reads them")
    add("--model", default=argparse.SUPPRESS, help="a folder or hub id of transformers; default tiny, a random one")
    add("--eval-data", default=argparse.SUPPRESS, metavar="FILE", help="held-out pairs; default: some of --data")
    add("--held-out", type=positive(int), default=argparse.SUPPRESS, metavar="N", help="held-out prompts, default 128")
    add(
        "--reward",
        default=argparse.SUPPRESS,
        help="MODULE:FUNCTION as TRL calls it, or a reward model's folder or id; without one only DPO is run",
    )
    add(
        "--judge",
        default=argparse.SUPPRESS,
        help="MODULE:FUNCTION(prompts, answers, others): how likely ours is better",
    )
    add("--method", nargs="+", choices=("dpo", "grpo"), help="default: dpo, and grpo where there is a --reward")
    add("--arms", nargs="+", metavar="ARM", help="of: full, no-negative, no-positive, no-reweighting, controlled")
    for name, words in (
        ("micro-batch", "answers on the device at once in training, default 4"),
        ("iterations", "updates on each rollout, default 2"),
        ("max-length", "tokens of prompt and answer, default 1024"),
        ("max-new-tokens", "tokens of an answer that is drawn, default 256"),
        ("lora", "rank of an adapter that is trained in the place of the model"),
    ):
        add(f"--{name}", type=positive(int), default=argparse.SUPPRESS, metavar="N", help=words)
    add("--final", choices=("greedy", "sampled"), default=argparse.SUPPRESS, help="D', default greedy")
    add("--estimator", choices=("directional", "exact"), default=argparse.SUPPRESS, help="of G, default directional")
    add("--optim", default=argparse.SUPPRESS, help="default adamw_torch; paged_adamw_8bit needs bitsandbytes")
    add("--dtype", choices=("bfloat16", "float32"), default=argparse.SUPPRESS, help="default bfloat16 on a GPU")
    add("--plan", action="store_true", help="say what would be trained and what it takes, and stop")


def run(arguments: argparse.Namespace, watch: Watch) -> int:
    """Run what is left of a study on a pretrained model, and write its report.

    Returns:
        0; 1 where a run diverged; 130 after Ctrl-C.

    Raises:
        ValueError: arguments, a model, data or a reward that can't be used, before anything is trained.
    """
    if arguments.data is None:
        _check_output(arguments.output)
        _report(arguments.pool, arguments)
        return 0
    from fused_po.study.real_settings import RealSettings

    known = {one.name for one in fields(RealSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    if given.get("model", "tiny") != "tiny" and not _may_be_model(given["model"]):
        raise ValueError(f"--model {given['model']}: no such folder")
    settings = RealSettings(**{"model": "tiny", **given}).placed()
    methods = _methods(arguments, settings)
    arms = {method: _arms(arguments, method) for method in methods}
    _check_output(arguments.output)
    for line in settings.words(methods):
        print(line)
    if methods == ["dpo"] and settings.reward is None:
        print("only DPO: policies learn from a reward, and none was named (--reward)")
    watch.say("reading the model and the data")
    if arguments.plan:
        _say_needs(settings, arms)
        return 0
    _quiet()
    from fused_po.study.real_run import RealStudy

    study = RealStudy(settings, arguments.output)
    print(f"{len(study.pairs.train)} pairs to train on, {len(study.pairs.held_out)} held-out prompts")
    _say_needs(settings, arms, study.measure.start.config)
    first = arguments.first_seed or 0
    seeds = range(first, first + (arguments.seeds or SEEDS))
    todo = [(seed, method, arm) for seed in seeds for method in methods for arm in arms[method]]
    failed, ended = 0, 0

    def say(words: str, done: float) -> None:
        watch.say(words, (ended + done) / len(todo))

    try:
        for one in todo:
            try:
                study.run(*one, say)
            except FloatingPointError as error:
                failed += 1
                print(f"fused-po: seed {one[0]}, {one[1]}, {one[2]} failed: {error}", file=sys.stderr)
            ended += 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on")
        return INTERRUPTED
    watch.say("writing the report", 1.0)
    _report([arguments.output, *arguments.pool], arguments)
    return 1 if failed else 0


def _may_be_model(name: str) -> bool:
    """A folder that is there, or what looks like an id of the hub."""
    return Path(name).expanduser().is_dir() or not (name.startswith((".", "/", "~")) or name.count("/") > 1)


def _methods(arguments: argparse.Namespace, settings: Any) -> list[str]:
    asked = arguments.method or (["dpo"] if settings.reward is None else ["dpo", "grpo"])
    methods = [method for method in ("dpo", "grpo") if method in asked]
    if "grpo" in methods:
        if settings.reward is None:
            raise ValueError("--method grpo wants --reward: MODULE:FUNCTION, or a reward model's folder or id")
        if find_spec("trl") is None:
            raise ValueError("--method grpo needs TRL, which is not installed: pip install 'trl>=1.15'")
    return methods


def _arms(arguments: argparse.Namespace, method: str) -> list[str]:
    from fused_po.study.real_settings import arms_of

    known = list(arms_of(method))
    asked = known if arguments.arms is None else [arm.replace("-", " ") for arm in arguments.arms]
    for arm in asked:
        if arm not in known:
            names = ", ".join(one.replace(" ", "-") for one in known)
            raise ValueError(f"--arms {arm.replace(' ', '-')}: expected of {names}")
    return [arm for arm in known if arm in asked]


def _check_output(output: Path) -> None:
    if output.exists() and not (output / "study.json").exists() and (not output.is_dir() or begun(output)):
        raise ValueError(f"{output} exists and is neither an empty folder nor one of such a study")


def _say_needs(settings: Any, arms: dict[str, list[str]], config: Any = None) -> None:
    """What the study takes, before it takes it."""
    import torch
    from transformers import AutoConfig

    from fused_po.cli.profile_report import time_words
    from fused_po.prices import DEVICES
    from fused_po.study.real_memory import GIB, needs

    on_gpu = settings.device.startswith("cuda")
    if config is None and settings.model == "tiny":
        print("a random model of 6 million parameters: it takes about 1 GiB")
        return
    found = AutoConfig.from_pretrained(settings.model) if config is None else config
    name = torch.cuda.get_device_name().lower() if on_gpu else ""
    on = next((one for key, one in DEVICES.items() if key in name), DEVICES["h100"])
    wanted = needs(settings, found, on, tuple(arms))
    print(f"on paper, {wanted.parameters / 1e9:.3g} billion parameters, {wanted.trained / 1e9:.3g} trained:")
    for phase, parts in wanted.memory.items():
        largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
        words = ", ".join(f"{part} {size / GIB:.1f}" for part, size in largest)
        print(f"  {phase}: {sum(parts.values()) / GIB:.1f} GiB ({words})")
    print(f"  checkpoints of a run that G is measured over: {wanted.disk / GIB:.1f} GiB on the disk")
    seeds = {method: len(one) for method, one in arms.items()}
    where = on.name.upper() if on.name in name else f"one {on.name.upper()}, if there were one"
    hours = wanted.hours(settings, seeds)
    print(f"  updates of a seed on {where}: {f'{hours:.2g} hours' if hours >= 0.1 else time_words(3600 * hours)}")
    if on_gpu:
        free = torch.cuda.mem_get_info()[0]
        if wanted.peak > free:
            print(
                f"  that is more than the {free / GIB:.1f} GiB that are free: --lora, --optim paged_adamw_8bit, a "
                "smaller --micro-batch or --max-length take less"
            )


def _report(folders: list[Path], arguments: argparse.Namespace) -> None:
    from fused_po.study.real_pool import pooled
    from fused_po.study.real_report import write_real_report

    output: Path = arguments.output
    print(write_real_report(pooled(folders), output, command_of(arguments)))
    print(f"wrote {output}/report.html, report.md, plots/, win_rates.json and points.csv")


def _quiet() -> None:
    """The command has words and a bar of its own."""
    import warnings

    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # TRL and torch on what is of no concern here
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    # but an uncertain G is
    warnings.filterwarnings("always", message="G along the gradient", category=UserWarning)
