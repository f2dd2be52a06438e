"""``fused-po study``: what DPO and PPO do to a small model, measured and drawn."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fused_po.cli import study_real
from fused_po.cli.arguments import INTERRUPTED, command_of, positive
from fused_po.cli.progress import Watch, watched
from fused_po.cli.seeds import run_all

__all__ = ["add_parser"]

_EPILOG = """\
From a supervised start, trains DPO and PPO (or GRPO) on a task whose answers can be checked, whole and without one
component each, and measures G at checkpoints. The output folder then holds report.html, report.md, plots/ and every
number as CSV. The defaults take about forty minutes on two cores. Seeds are kept as they end: after Ctrl-C the same
command goes on with the rest, and more --seeds add to those that are there. Of two defaults the second is that with
--data.
"""
# of --quick
QUICK_SEEDS = 3
# what a setting is, with its default, and that of a study with --data behind a bar; torch is not imported for --help
_COUNTS = {
    "hidden-size": "of the model, default 64",
    "layers": "of the model, default 2",
    "largest": "totals of the task go from 10 to this, default 30",
    "sft-steps": "of the supervised start, default 600",
    "sft-batch": "answers in one of them, default 128",
    "steps": "updates of each method, default 240 | 200",
    "pairs": "that DPO learns from, default 512",
    "batch": "answers in an update, default 64 | 64",
    "epochs": "of PPO over each rollout, default 2",
    "minibatches": "of PPO in each of them, default 2",
    "generations": "answers to each prompt in a rollout, default 4 | 8",
    "checkpoints": "models of a run that are measured, default 9 | 6",
    "samples": "answers of an evaluation | that D and D' are made of, default 256 | 128",
    "draws": "of PPO's D at a checkpoint, default 4",
    "final-draws": "of D' from the final model, default 4",
}
_RATES = {
    "sft-lr": "learning rate of the supervised start, default 0.004",
    "dpo-lr": "learning rate of DPO, default 0.0001 | 5e-07",
    "ppo-lr": "learning rate of the policy, default 0.0003 | 1e-06",
    "critic-lr": "learning rate of the value model, default 0.001",
    "beta": "of DPO, default 0.1 | 0.1",
    "epsilon": "PPO's clip, default 0.2 | 0.2",
}


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser("study", help="watch what DPO and PPO do, by the paper's G", epilog=_EPILOG)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="a new or empty folder, or that of a study to go on with")
    add("--seeds", type=positive(int), help="independent repetitions, default 20, of --quick 3, with --data 3")
    add("--first-seed", type=natural, metavar="N", help="seeds are N, N + 1, ..., default 1000, with --data 0")
    add("--pool", type=Path, nargs="+", default=[], metavar="DIR", help="studies whose seeds join this one's report")
    add("--workers", type=positive(int), help="seeds side by side, default a core each; 1 on a GPU")
    add("--quick", action="store_true", help="a smoke run of a minute, to see whether it works; it decides nothing")
    # defaults stand where they are documented
    add("--policy-loss", choices=("ppo", "grpo"), default=argparse.SUPPRESS, help="default ppo")
    add("--device", default=argparse.SUPPRESS, help="default cpu")
    for name in _COUNTS:
        add(f"--{name}", type=positive(int), default=argparse.SUPPRESS, metavar="N", help=_COUNTS[name])
    for name in _RATES:
        add(f"--{name}", type=positive(float), default=argparse.SUPPRESS, metavar="X", help=_RATES[name])
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
        0; 1 where a seed failed; 130 after Ctrl-C, with the seeds kept that had ended.

    Raises:
        ValueError: arguments or a device that can't be used, before anything is trained; or a start that answers too
            well or too badly to learn from, in every seed.
        FloatingPointError: a training that diverges, in every seed.
    """
    try:
        with watched("loading torch", total=1.0) as watch:
            real = arguments.data is not None or any((folder / "study.json").exists() for folder in arguments.pool)
            _check_flags(arguments, real)
            return (study_real.run if real else _studied)(arguments, watch)
    except KeyboardInterrupt:
        words = f"seeds that had ended are kept in {arguments.output}, and the same command goes on with the rest"
        print(f"fused-po: interrupted; {words}", file=sys.stderr)
        return INTERRUPTED


def _check_flags(arguments: argparse.Namespace, real: bool) -> None:
    """Whether all flags that were given are of this kind of study.

    Raises:
        ValueError: one is not.
    """
    from fused_po.study.real_settings import RealSettings
    from fused_po.study.settings import Settings

    of_small, of_real = ({one.name for one in fields(kind)} for kind in (Settings, RealSettings))
    of_small, of_real = of_small | {"quick", "workers"}, of_real | {"method", "arms", "plan"}
    wrong, why = of_real - of_small, "of a study on a pretrained model: it wants --data"
    if real:
        wrong, why = of_small - of_real, "not of a study on a pretrained model"
    if real and arguments.data is None:
        wrong, why = of_small | of_real, "not of a report that --pool makes without --data"
    for name, value in vars(arguments).items():
        if name in wrong and value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} is {why}")


@dataclass(frozen=True)
class _Work:
    """What a process does with a seed."""

    store: Any
    settings: Any

    def __call__(self, seed: int, advance: Callable[[int], Any]) -> None:
        from fused_po.study.run import run_seed

        start = time.process_time()
        results = run_seed(seed, self.settings, advance)
        self.store.write(seed, results, time.process_time() - start)


def _studied(arguments: argparse.Namespace, watch: Watch) -> int:
    # torch and transformers take seconds to import; a wrong argument should not
    from fused_po.study.run import Results, total_updates
    from fused_po.study.settings import FIRST_SEED, QUICK, SEEDS, Settings
    from fused_po.study.store import Store
    from fused_po.trainers.loading import device_of

    known = {one.name for one in fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    settings = Settings(**((QUICK if arguments.quick else {}) | given))
    device_of(settings.device)
    kept = asdict(settings)
    pool = [Store(folder, kept) for folder in arguments.pool]
    for one in pool:
        one.check()
    store = Store(arguments.output, kept)
    store.open()
    first = FIRST_SEED if arguments.first_seed is None else arguments.first_seed
    wanted = range(first, first + (arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)))
    there = {seed for one in (store, *pool) for seed in one.seeds()}
    missing = [seed for seed in wanted if seed not in there]
    workers = arguments.workers or ((os.cpu_count() or 1) if settings.device == "cpu" else 1)
    total = max(1, len(missing) * total_updates(settings))
    failures: dict[int, Exception] = {}
    if missing:
        watch.say(f"starting {min(workers, len(missing))} processes", 0.0)
    ended = len(there & set(wanted))

    def progress(done: int) -> None:
        if done:
            watch.say(f"training, {ended} of {len(wanted)} seeds done", done / total)

    def report(last: bool) -> list[Any]:
        from fused_po.study.report import write_report, write_results
        from fused_po.study.small import about

        results, seconds, taken = Results(), 0.0, set()
        for one in (store, *pool):
            own = [seed for seed in one.seeds() if seed not in taken]
            taken |= set(own)
            numbers, spent = one.read(own)
            results += numbers
            seconds += spent
        results.points.sort(key=lambda point: point.seed)
        results.bins.sort(key=lambda bar: bar.seed)
        write_results(results, arguments.output)
        said = {seed: str(failures[seed]) for seed in sorted(failures)}
        command = command_of(arguments, "workers", "pool")
        words = about(settings, sorted(taken), command, seconds, arguments.quick, not last)
        return write_report(results, words, arguments.output, said)

    crew = min(workers, max(1, len(missing)))
    with closing(run_all(missing, _Work(store, settings), crew, progress)) as outcomes:
        for outcome in outcomes:
            if outcome.error is not None:
                failures[outcome.seed] = outcome.error
                print(f"fused-po: seed {outcome.seed} failed: {outcome.error}", file=sys.stderr)
                continue
            ended += 1
            if ended == 1 and len(missing) > 1:
                report(last=False)
                print(f"a first look, after one seed: {arguments.output}/report.html", file=sys.stderr)
    if not any(one.seeds() for one in (store, *pool)):
        raise failures[min(failures)]
    watch.say("writing the report", 1.0)
    _say(report(last=True), arguments.output, failures)
    return 1 if failures else 0


def _say(findings: Sequence[Any], output: Path, failures: Mapping[int, Exception]) -> None:
    from fused_po.study.report import in_words, result

    tested = [one for one in findings if one.claim.confirmatory]
    said = {seed: str(failures[seed]) for seed in sorted(failures)}
    (output / "verdicts.md").write_text(in_words(findings, "study/plots", said), encoding="utf-8")
    for one in tested:
        print(f"{one.verdict:>14}: {one.claim.text} ({one.text})")
    print(result(findings, len(tested[0].values)).replace("*", ""))
    print(f"wrote {output}/report.html, report.md, plots/ and CSV")
