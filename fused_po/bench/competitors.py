"""Who takes part in a case: methods of this project, of torch and of other packages, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fused_po.bench.cases import Problem
from fused_po.bench.methods import OURS, Absent, Method, of_torch, ours
from fused_po.bench.peers import PEERS
from fused_po.kernels.select import BACKENDS

__all__ = ["NAMES", "QUICK", "check_names", "competitors"]

# by whom each is known in tables
NAMES = {
    "linear_loss": "`linear_loss`",
    "linear_token_stats": "`linear_token_stats`",
    "token_stats": "`token_stats` on full logits",
    "eager": "torch eager",
    "compile": "torch.compile",
    "trl": "TRL `ChunkedLogProbFunction`",
    "liger": "Liger `chunked_loss`",
    "liger_ce": "Liger scaled cross entropy",
    "cce": "CCE",
    "torch_lce": "torch `linear_cross_entropy`",
    "quack": "quack linear cross entropy",
}
# of a first look: what needs no compiler and is done in seconds
QUICK = ("ours", "eager", "trl")


def check_names(names: Sequence[str]) -> None:
    """Whether these are names of methods, ``ours`` or ``peers``.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        route, _, backend = name.removesuffix("]").partition("[")
        if route not in {*NAMES, "ours", "peers"} or (backend and (route not in OURS or backend not in BACKENDS)):
            raise ValueError(f"no method {name!r}: wanted {', '.join(NAMES)}, ours or peers")


def competitors(
    problem: Problem, device: str, only: Sequence[str] | None = None, trl_columns: int | None = None
) -> tuple[list[Method], dict[str, str]]:
    """The methods that run a case here, this project's first, and why the others do not.

    Args:
        only: names of methods, ``ours`` or ``peers``; None: all. A bare name takes the default backend.
        trl_columns: the width of TRL's tiles, default that of its trainers.

    Raises:
        ValueError: an unknown name.
    """
    check_names(only or ())
    methods, absent = ours(problem, device)
    methods += of_torch()
    for name, make in PEERS.items():
        if only is not None and not {name, "peers"} & set(only):
            continue
        try:
            if problem.case.from_logits:
                raise Absent("the case starts from logits")
            method = make(problem.case, device)
            if name == "trl" and trl_columns is not None:
                method = replace(method, call=partial(method.call, columns=trl_columns))
            methods.append(method)
        except Absent as error:
            absent[name] = str(error)
        except Exception as error:
            # importing a peer runs through half of the ecosystem and fails in many ways
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if only is None:
        return methods, absent

    def wanted(name: str, mine: bool) -> bool:
        return name in only or ("ours" if mine else "peers") in only

    kept = {name: why for name, why in absent.items() if wanted(name, name.split("[")[0] in OURS)}
    return [method for method in methods if wanted(method.name, method.ours)], kept
