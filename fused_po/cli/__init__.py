"""The command line: ``fused-po COMMAND``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fused_po.cli import bench, doctor, g, profile, study, train
from fused_po.cli.arguments import INTERRUPTED

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 where ``--compare`` found a disagreement, the training diverged, a backend failed its self-test, or a case
        of ``bench`` or a seed of ``study`` failed; 2 for bad input; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="fused-po", description="Preference optimization in one fused pass.")
    commands = parser.add_subparsers(dest="command", required=True)
    train.add_parser(commands)
    study.add_parser(commands)
    g.add_parser(commands)
    bench.add_parser(commands)
    profile.add_parser(commands)
    doctor.add_parser(commands)
    try:
        given = train.with_config(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"fused-po: {error}", file=sys.stderr)
        return 2
    arguments, rest = parser.parse_known_args(given)
    # train has the engine's flags beside its own
    if rest and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    # torch's own remarks on profiled memory are for its developers
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code: int = arguments.run(arguments)
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        print(f"fused-po: {said}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"fused-po: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"fused-po: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fused-po: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code
