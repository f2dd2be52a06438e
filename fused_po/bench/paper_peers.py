"""Functions of other packages on paper: counted on fake CUDA tensors, which a CUDA build of torch makes without a GPU.

Tensors on ``meta`` would not do: the functions take other branches there. Where nothing can be counted, what was
counted before is read from ``paper_peers.json``, which the repository's ``bench.record_paper`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_po.bench.methods import Absent
from fused_po.bench.paper import CASES, PaperCase, Sheet
from fused_po.bench.peers import TRL_COLUMNS
from fused_po.ledger import Ledger, autocast, record

__all__ = ["PEERS", "RECORDED", "count", "counted_with", "recorded"]

RECORDED = Path(__file__).with_suffix(".json")


class _Context:
    """What an autograd function keeps: the engine of autograd wants a GPU for tensors of one, so it runs without."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        pass

    def save_for_backward(self, *saved: Any) -> None:
        self.saved_tensors = saved


def _trl(case: PaperCase) -> tuple[Ledger, int]:
    """The function that TRL's trainers take log-probs from, whatever is made of them."""
    function = import_module("trl.trainer.utils")._ChunkedLogProbFunction
    stored = torch.float32 if case.autocast else case.dtype
    entropy = case.entropy or case.loss == "ppo-entropy"
    hidden = torch.empty(case.tokens, case.hidden, dtype=stored, device="cuda")
    weight = torch.empty(case.vocab, case.hidden, dtype=stored, device="cuda")
    labels = torch.empty(case.tokens, dtype=torch.int64, device="cuda")
    gradient = torch.empty(case.tokens, dtype=torch.float32, device="cuda")
    context = _Context((True, not case.frozen, False))
    asked = ("entropy",) if entropy else ()
    with torch.no_grad(), autocast(case.dtype) if case.autocast else nullcontext(), record("cuda") as ledger:
        outputs = function.forward(context, hidden, weight, None, labels, 1.0, TRL_COLUMNS, case.softcap, 1.0, asked)
        found = function.backward(context, gradient, gradient if entropy else None)
        del outputs
    return ledger, ledger.scratch(grad for grad in found[:2] if grad is not None)


PEERS: dict[str, Callable[[PaperCase], tuple[Ledger, int]]] = {"trl": _trl}


def count(name: str, case: PaperCase) -> Sheet:
    """A peer's call, counted here.

    Raises:
        Absent: torch or the package cannot do it here, with the reason.
    """
    if torch.version.cuda is None:
        raise Absent("fake CUDA tensors need a CUDA build of torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            ledger, scratch = PEERS[name](case)
    except (ImportError, AttributeError) as error:
        raise Absent(f"{type(error).__name__}: {error}") from error
    return Sheet(case, ledger, scratch)


def recorded(name: str, case: str) -> Sheet | None:
    """What was counted of a peer before; None: nothing of that case."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))["peers"].get(name, {}).get(case)
    return None if found is None else Sheet(CASES[case], Ledger.from_json(found), found["scratch"])


def counted_with() -> dict[str, str]:
    """The versions that the recorded figures are of, and the command."""
    found: dict[str, str] = json.loads(RECORDED.read_text(encoding="utf-8"))["with"]
    return found
