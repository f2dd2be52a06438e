"""The loss and the split that arguments of a command name."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

__all__ = ["loss_of", "split_of"]


def loss_of(arguments: argparse.Namespace) -> Any:
    """The loss that ``--loss``, ``--beta`` and ``--loss-arg`` name."""
    from fused_po import losses

    names = arguments.loss.split("+")
    given = _values("--loss-arg", arguments.loss_arg) | ({} if arguments.beta is None else {"beta": arguments.beta})
    given |= {"paired": True} if names == ["sft"] else {}
    return losses.create(names if len(names) > 1 else names[0], **given)


def split_of(arguments: argparse.Namespace) -> Any:
    """The preset that ``--split`` and ``--split-arg`` name, or None."""
    from fused_po import splits

    if arguments.split is None:
        if arguments.split_arg:
            raise ValueError("--split-arg wants --split")
        return None
    presets = {name: getattr(splits, name) for name in splits.__all__}
    presets = {name: make for name, make in presets.items() if make.__annotations__.get("return") == "Split"}
    presets["split"] = splits.Split
    if arguments.split not in presets:
        raise ValueError(f"--split {arguments.split}: expected one of {', '.join(sorted(presets))}")
    try:
        return presets[arguments.split](**_values("--split-arg", arguments.split_arg))
    except TypeError as error:
        raise ValueError(f"--split-arg: {error}") from None


def _values(flag: str, given: Sequence[str]) -> dict[str, Any]:
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
