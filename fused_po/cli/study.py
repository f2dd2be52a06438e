"""``fused-po study``: what DPO and PPO do to a small model, measured and drawn."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fused_po.cli import study_real
from fused_po.cli.arguments import positive
from fused_po.cli.progress import Watch, watched

__all__ = ["add_parser"]

_EPILOG = """\
From a supervised start, trains DPO and PPO (or GRPO) on a task whose answers can be checked, whole and without one
component each, and measures G at checkpoints. The output folder then holds report.html, report.md, plots/ and every
number as CSV. The defaults take about ten minutes on two cores.
"""


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser("study", help="watch what DPO and PPO do, by the paper's G", epilog=_EPILOG)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="a new or empty folder")
    add("--seeds", type=positive(int), help="independent repetitions, for error bars, default 5, with --data 3")
    add("--first-seed", type=natural, default=0, metavar="N", help="seeds are N, N + 1, ..., default 0")
    add("--workers", type=positive(int), help="seeds side by side, default a core each; 1 on a GPU")
    add("--quick", action="store_true", help="a small study of half a minute a seed, to see whether it runs")
    # defaults stand where they are documented
    add("--model", default=argparse.SUPPRESS, help="'tiny' (default), or a folder or hub id of transformers")
    add("--policy-loss", choices=("ppo", "grpo"), default=argparse.SUPPRESS, help="default ppo")
    add("--estimator", choices=("exact", "directional"), default=argparse.SUPPRESS, help="of G, default exact")
    add("--device", default=argparse.SUPPRESS, help="default cpu")
    whole = "hidden-size layers largest sft-steps sft-batch steps pairs batch epochs minibatches generations"
    for name in (*whole.split(), "checkpoints", "samples", "draws"):
        add(f"--{name}", type=positive(int), default=argparse.SUPPRESS, metavar="N", help="see fused_po.study.settings")
    for name in ("sft-lr", "dpo-lr", "ppo-lr", "critic-lr", "beta", "epsilon"):
        add(f"--{name}", type=positive(float), default=argparse.SUPPRESS, metavar="X")
    add(
        "--noise", type=float, default=argparse.SUPPRESS, metavar="X", help="share of wrong demonstrations, default 0.4"
    )
    study_real.add_flags(parser)
    parser.set_defaults(run=run)


def natural(text: str) -> int:
    """A type for ``argparse``: 0 or a number above it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, run the seeds, write the report. Seeds that fail are left out of it, and named.

    Returns:
        0; 1 where a seed failed.

    Raises:
        ValueError: arguments, a model or a device that can't be used, before anything is trained; or a start that
            answers too well or too badly to learn from, in every seed.
        FloatingPointError: a training that diverges, in every seed.
    """
    with watched("loading torch", total=1.0) as watch:
        if arguments.data is not None or arguments.pool:
            return study_real.run(arguments, watch)
        return _studied(arguments, watch)


def _studied(arguments: argparse.Namespace, watch: Watch) -> int:
    arguments.seeds = arguments.seeds or 5
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder")
    # torch and transformers take seconds to import; a wrong argument should not
    from fused_po.study.report import write_report, write_results
    from fused_po.study.run import Results, check
    from fused_po.study.settings import QUICK, Settings

    known = {one.name for one in fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    settings = Settings(**((QUICK if arguments.quick else {}) | given))
    check(settings)
    output.mkdir(parents=True, exist_ok=True)
    results = Results()
    failures: dict[int, Exception] = {}
    for seed, part in _seeds(arguments, settings, watch):
        if isinstance(part, Exception):
            failures[seed] = part
            print(f"fused-po: seed {seed} failed: {part}", file=sys.stderr)
        else:
            results.points += part.points
            results.bins += part.bins
    if not results.points:
        raise failures[min(failures)]
    watch.say("writing the report", 1.0)
    results.points.sort(key=lambda point: point.seed)
    results.bins.sort(key=lambda one: one.seed)
    write_results(results, output)
    (output / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    said = {seed: str(failures[seed]) for seed in sorted(failures)}
    findings = write_report(results, settings, output, _command(arguments), _processor_time(), said)
    for one in findings:
        print(f"{one.verdict:>14}: {one.claim.text} ({one.text})")
    print(f"wrote {output}/report.html, report.md, plots/ and CSV")
    return 1 if failures else 0


def _seeds(arguments: argparse.Namespace, settings: Any, watch: Watch) -> Iterator[tuple[int, Any]]:
    """Each seed with its results or with the error that it ended in, as they come."""
    from fused_po.study.run import total_updates

    workers = arguments.workers or (min(arguments.seeds, os.cpu_count() or 1) if settings.device == "cpu" else 1)
    # forking a process that uses threads is not safe
    context = get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, _start_worker, (workers,)) as pool,
    ):
        done = manager.list([0] * arguments.seeds)
        total = arguments.seeds * total_updates(settings)
        seeds: dict[Future[Any], int] = {}
        for index in range(arguments.seeds):
            seed = arguments.first_seed + index
            seeds[pool.submit(_seed, index, seed, settings, done)] = seed
        waiting = set(seeds)
        try:
            while waiting:
                ready, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                watch.say("training", sum(done) / total)
                for one in ready:
                    error = one.exception()
                    # an interrupt is no result of a seed
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield seeds[one], error or one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _processor_time() -> float:
    """Seconds that the workers took, which have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _start_worker(workers: int) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    logging.disable_progress_bar()


def _seed(index: int, seed: int, settings: Any, done: Any) -> Any:
    from fused_po.study.run import run_seed

    # a round trip to the parent for every update would cost more than the update
    counted = [0]

    def advance(updates: int) -> None:
        counted[0] += updates
        if counted[0] % 20 == 0:
            done[index] = counted[0]

    return run_seed(seed, settings, advance)


def _command(arguments: argparse.Namespace) -> str:
    """The command line that repeats the study, whatever the folder."""
    words = ["fused-po", "study"]
    for name, value in vars(arguments).items():
        if name in ("command", "run", "output", "workers") or value is False:
            continue
        if name == "first_seed" and not value:
            continue
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join([*words, "--output", "DIR"])
