"""Products of the tensor cores."""

from __future__ import annotations

from typing import Any

__all__ = ["Products"]


class Products:
    def __init__(self, machine: Any) -> None:
        self.machine = machine
