"""``fused-po profile``: memory and time against length, of a head or a whole step, predicted and measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_po.cli.arguments import memory_size, positive
from fused_po.cli.progress import watched

if TYPE_CHECKING:
    from fused_po.cli.profile_steps import Steps
    from fused_po.prices import Device

__all__ = ["add_parser"]

_EPILOG = """\
The memory model predicts the peak at every length and the largest length that fits, and both are on the screen before
anything runs. Then lengths that fit are run, the shortest first, for as long as --seconds last; all others stay
predictions. With --gpu nothing is run: memory and time are those of a GPU that need not be there, on paper. The fused
route is DPO through linear_loss, the other the same loss through full logits and autograd; a length is the number of
tokens of one pair.
"""
_LENGTHS = [1 << power for power in range(10, 21)]


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser("profile", help="memory and time against sequence length", epilog=_EPILOG)
    add = parser.add_argument
    add("--hidden", type=positive(int), metavar="H", help="hidden size of the head")
    add("--vocab", type=positive(int), metavar="V", help="classes of the head")
    add("--model", help="instead of --hidden and --vocab: 'tiny', or a folder or hub id of transformers")
    add("--whole-step", action="store_true", help="forward and backward of the whole --model, not of its head alone")
    add("--frozen", action="store_true", help="the head is not trained")
    add("--lengths", type=positive(int), nargs="+", default=_LENGTHS, metavar="N", help="default 1024, 2048, ... 1M")
    add("--gpu", "--paper", metavar="NAME", help="predict for a100, h100, h200 or b200; nothing is run")
    add("--predict-only", action="store_true", help="run nothing")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on a GPU, float32 on a CPU")
    add("--device", choices=("cpu", "cuda"), help="what it runs on, default a GPU if there is one")
    add("--memory", type=memory_size, metavar="SIZE", help="with a unit, 80GiB; default: what is free on the device")
    add("--scratch", type=memory_size, metavar="SIZE", help="scratch_bytes of linear_loss, default its own")
    add("--seconds", type=positive(float), default=30.0, help="how long to measure in all, default 30")
    add("--snapshot", type=Path, metavar="FILE", help="memory snapshot of the longest fused step, for a GPU")
    add("--seed", type=int, default=0)
    add("--output", type=Path, required=True, help="folder for profile.png, profile.json and profile.csv")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, predict, show that, measure, write.

    Raises:
        ValueError: arguments that do not fit together, or a device that is not there.
    """
    _check(arguments)
    with watched("loading torch") as watch:
        on = _target(arguments)
        import torch

        from fused_po.cli.profile_measure import measure, predictions
        from fused_po.cli.profile_report import largest_lengths, show, write
        from fused_po.cli.profile_steps import free_memory, snapshot

        device = _device(arguments, on)
        memory = arguments.memory or (free_memory(device) if on is None else on.memory)
        watch.say("reading the model" if arguments.model else "predicting")
        steps = _steps(arguments, device)
        lengths = sorted({max(2, length // 2 * 2) for length in arguments.lengths})
        watch.say("predicting")
        rows = predictions(steps, lengths, memory, on)
        largest = {route: steps.largest(route, memory) for route in ("fused", "full_logits")}
        where = f"on paper, {on.name}" if on else torch.cuda.get_device_name() if device == "cuda" else "this CPU"
        found: dict[str, Any] = {
            "what": f"{steps.describe()}, {where}",
            "device": where,
            "torch": torch.__version__,
            "memory_bytes": memory,
            "largest_length": largest,
            "rows": rows,
        }
        print(found["what"])
        if on is None and device == "cpu":
            print("  for the numbers of a GPU, name one: --gpu h100 (or a100, h200, b200)")
        print(f"  {largest_lengths(largest, memory)}", flush=True)
        show(rows)
        print(f"the fused route at {lengths[-1]} tokens:\n{steps.explain(lengths[-1], on)}", flush=True)
        write(found, arguments.output)
        if on is None and not arguments.predict_only:
            try:
                measure(steps, rows, arguments.seconds, watch)
            finally:
                write(found, arguments.output)
            show(rows)
            ran = [row["length"] for row in rows if row["route"] == "fused" and row["seconds"] is not None]
            if arguments.snapshot is not None and ran:
                snapshot(steps, max(ran), arguments.snapshot)
                print(f"wrote {arguments.snapshot}: open it at pytorch.org/memory_viz")
    print(f"wrote {arguments.output}/profile.png, profile.json and profile.csv")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """What can be known to be wrong before torch is imported."""
    by_size = arguments.hidden is not None and arguments.vocab is not None
    if by_size == (arguments.model is not None):
        raise ValueError("either --hidden with --vocab, or --model, is wanted")
    if arguments.whole_step and arguments.model is None:
        raise ValueError("--whole-step is of a --model")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"{arguments.output} is a file; --output wants a folder")
    if arguments.gpu is not None:
        if arguments.device is not None:
            raise ValueError("--gpu names the device of a prediction, --device one to run on: give one of them")
        if arguments.whole_step:
            raise ValueError("--whole-step is measured in part, on the device at hand: leave --gpu out")
    if arguments.snapshot is not None and (arguments.gpu is not None or arguments.predict_only):
        raise ValueError("--snapshot is of a step that runs: leave --gpu and --predict-only out")


def _target(arguments: argparse.Namespace) -> Device | None:
    from fused_po.prices import device

    return None if arguments.gpu is None else device(arguments.gpu.lower())


def _device(arguments: argparse.Namespace, on: Device | None) -> str:
    """The type of the device that is predicted for, and run on."""
    import torch

    if on is not None:
        return "cuda"
    device: str = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU; fused-po doctor says more, --gpu predicts")
    if arguments.snapshot is not None and device == "cpu":
        raise ValueError("--snapshot records torch's CUDA allocator; on a CPU there is none, see profile.json instead")
    return device


def _steps(arguments: argparse.Namespace, device: str) -> Steps:
    import torch

    from fused_po.cli.profile_steps import HeadSteps, ModelSteps

    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    common = {"device": device, "dtype": dtype, "scratch_bytes": arguments.scratch, "seed": arguments.seed}
    if arguments.whole_step:
        return ModelSteps(arguments.model, frozen=arguments.frozen, **common)
    if arguments.model is not None:
        return HeadSteps.of_model(arguments.model, frozen=arguments.frozen, **common)
    return HeadSteps(arguments.hidden, arguments.vocab, frozen=arguments.frozen, **common)
