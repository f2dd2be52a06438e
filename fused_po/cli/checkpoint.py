"""Checkpoints: all that decides the next step, written whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_checkpoint", "save_checkpoint"]

# what must not change between a run and its continuation
_FIXED = (
    "model",
    "data",
    "loss",
    "beta",
    "batch_size",
    "lr",
    "seed",
    "lora",
    "max_length",
    "on_too_long",
    "dtype",
    "steps",
)


def save_checkpoint(
    output: Path, step: int, arguments: argparse.Namespace, model: Any, optimizer: Any, schedule: Any
) -> None:
    """Write ``output/checkpoint``, replacing the one before only once it is complete."""
    fresh, final, old = output / "checkpoint.new", output / "checkpoint", output / "checkpoint.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    state = {
        "step": step,
        "arguments": {name: _plain(getattr(arguments, name)) for name in _FIXED},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, fresh / "state.pt")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(output: Path, arguments: argparse.Namespace, model: Any, optimizer: Any, schedule: Any) -> int:
    """Restore ``output/checkpoint`` and return its step.

    Raises:
        ValueError: it belongs to a run with other arguments, or is complete already.
    """
    try:
        state = torch.load(output / "checkpoint" / "state.pt", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{output}/checkpoint can't be read: {str(error).splitlines()[0]}") from None
    for name, before in state["arguments"].items():
        now = _plain(getattr(arguments, name))
        if name == "data" and now != before:
            raise ValueError("--resume with other --data: the contents of the file have changed")
        if now != before:
            raise ValueError(f"--resume with another --{name.replace('_', '-')}: {now}, the run began with {before}")
    if state["step"] >= arguments.steps:
        raise ValueError(f"nothing to resume: {output} holds all {arguments.steps} steps")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    step: int = state["step"]
    return step


def _plain(value: Any) -> Any:
    """A file counts by its contents."""
    return hashlib.sha256(value.read_bytes()).hexdigest() if isinstance(value, Path) else value
