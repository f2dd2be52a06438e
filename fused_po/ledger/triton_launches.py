"""Launches of Triton kernels on fake tensors: they do not run, and are priced by the bytes that they load and store."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fused_po.ledger.rules import Cost, footprint

__all__ = ["intercepted", "moved_parameters"]


@contextmanager
def intercepted(note: Callable[[str, Cost], None]) -> Iterator[None]:
    """While the context is entered, no Triton kernel is launched; each is noted with its name and cost."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        moved = moved_parameters(inspect.getsource(kernel.fn))
        pointers = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        traffic = sum(moved.get(name, 1) * footprint(value) for name, value in pointers.items())
        note(f"triton::{kernel.fn.__name__}", Cost(traffic=traffic))

    before = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}
    for kind in before:
        kind.run = run
    try:
        yield
    finally:
        for kind, own in before.items():
            kind.run = own


def moved_parameters(source: str) -> dict[str, int]:
    """How often a kernel passes the memory behind each pointer: 1, loaded or stored; 2, both.

    Found from the expressions in its ``tl.load`` and ``tl.store``; a pointer that neither names (one handed to another
    function) is not listed. A loop over the same elements counts once.

    Args:
        source: the kernel's source text.
    """
    function = next(node for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.FunctionDef))
    # which parameters the value of a name is computed from
    origins = {argument.arg: {argument.arg} for argument in function.args.args}
    passed: dict[str, set[str]] = {"load": set(), "store": set()}

    def named(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Call):
            kind = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if kind in passed:
                passed[kind] |= named(node.args[0])
                for other in (*node.args[1:], *(keyword.value for keyword in node.keywords)):
                    named(other)
                # what was loaded is a number
                return set()
        if isinstance(node, ast.Name):
            return origins.get(node.id, set())
        return {name for child in ast.iter_child_nodes(node) for name in named(child)}

    def visit(body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, (ast.Assign, ast.AugAssign)):
                value = named(statement.value)
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        old = origins.get(target.id, set()) if isinstance(statement, ast.AugAssign) else set()
                        origins[target.id] = old | value
            elif isinstance(statement, (ast.For, ast.If, ast.While)):
                named(statement.iter if isinstance(statement, ast.For) else statement.test)
                visit(statement.body)
                visit(statement.orelse)
            else:
                named(statement)

    visit(function.body)
    return {name: (name in passed["load"]) + (name in passed["store"]) for name in passed["load"] | passed["store"]}
