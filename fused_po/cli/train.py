"""``fused-po train``: from a file of preferences to a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fused_po.cli.arguments import positive

__all__ = ["add_parser"]

_DATA = Path(__file__).parents[1] / "data"
_EPILOG = """\
Losses on pairs (sigmoid, ipo, simpo, ...) take a pair as it is; those on single answers (kto, bco, ...) take its two
answers as desirable and undesirable, kto with the reference point from prompts paired with the answers of others; sft
learns the chosen answer; policy losses (ppo, dapo, ...) take an advantage of +1 on chosen and -1 on rejected answers,
with the starting policy as the old one. The reference is the starting policy. docs/losses.md lists all.
"""


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser("train", help="train a causal language model on preference pairs", epilog=_EPILOG)
    add = parser.add_argument
    add("--model", default="tiny", help="a folder or hub id of transformers, or 'tiny': a small random Llama (default)")
    add("--data", type=Path, help="JSONL with prompt, chosen, rejected a line; default: a small set that is shipped")
    add("--eval-data", type=Path, help="held-out pairs, same format; default: none, or those shipped with the set")
    add("--loss", default="sigmoid", help="a registered loss, default sigmoid (DPO)")
    add("--beta", type=float, help="the loss's beta, default its own")
    add("--steps", type=positive(int), default=60, help="optimizer steps, default 60")
    add("--batch-size", type=positive(int), default=4, help="pairs a step, default 4")
    add("--lr", type=positive(float), default=1e-4, help="peak learning rate of AdamW, default 1e-4")
    add("--seed", type=int, default=0, help="of the tiny model, adapters and the order of pairs, default 0")
    add("--lora", type=positive(int), metavar="R", help="train a LoRA adapter of this rank; the head stays frozen")
    add("--max-length", type=positive(int), default=1024, help="tokens of prompt and answer together, default 1024")
    add("--on-too-long", choices=("truncate", "refuse"), default="truncate", help="what to do with longer pairs")
    add("--eval-every", type=positive(int), default=20, metavar="N", help="steps between evaluations, default 20")
    add("--save-every", type=positive(int), default=50, metavar="N", help="steps between checkpoints, default 50")
    add("--device", help="default: a GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast, weights stay float32")
    add("--compare", action="store_true", help="also take every step through full logits; exit 1 if the two disagree")
    add("--resume", action="store_true", help="continue from the checkpoint in --output")
    add("--output", type=Path, required=True, help="a new or empty folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, then train.

    Raises:
        ValueError: whatever can't be trained, before anything is written.
    """
    if arguments.data is None:
        arguments.data = _DATA / "preferences.jsonl"
        arguments.eval_data = arguments.eval_data or _DATA / "preferences_eval.jsonl"
    if arguments.compare and arguments.dtype != "float32":
        raise ValueError(
            "--compare needs --dtype float32: in bfloat16 the plain path rounds its logits and must differ"
        )
    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; --output wants a folder")
    if arguments.resume and not (output / "checkpoint").is_dir():
        raise ValueError(f"nothing to resume: {output} holds no checkpoint")
    if not arguments.resume and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty: choose another folder, or --resume to continue in it")
    # torch and transformers take seconds to import; a wrong argument should not
    from fused_po.cli.loop import train

    return train(arguments)
