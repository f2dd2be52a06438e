"""What a library of trainers has replaced: on, off, on with other options, or on for a while."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

__all__ = ["Enabled", "Switch"]


class Enabled:
    """What an ``enable`` returns; as a context it brings back at its end what was there before."""

    def __init__(self, switch: Switch, before: dict[str, Any] | None) -> None:
        self._switch, self._before = switch, before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is None:
            self._switch.disable()
        else:
            self._switch.enable(**self._before)


class Switch:
    """Replaces and puts back, once however often it is called.

    Args:
        install: ``install(count, **options)`` replaces functions by ones that call ``count`` each time, and returns
            what puts them back. If it raises, it has changed nothing.
    """

    def __init__(self, install: Callable[..., Callable[[], None]]) -> None:
        self._install = install
        self._remove: Callable[[], None] | None = None
        self._options: dict[str, Any] = {}
        self._calls = 0

    def is_enabled(self) -> bool:
        """Whether the library's trainers take their log-probs from here."""
        return self._remove is not None

    def calls(self) -> int:
        """How many calls of its trainers were answered since ``enable``; 0 where it is not enabled."""
        return self._calls if self.is_enabled() else 0

    def enable(self, **options: Any) -> Enabled:
        """Replace; what is on already gets other options. Where that fails, it is off."""
        before = self._options if self.is_enabled() else None
        self.disable()
        self._remove, self._options, self._calls = self._install(self._count, **options), options, 0
        return Enabled(self, before)

    def disable(self) -> None:
        """Put the library's own functions back; nothing happens where ``enable`` was not called."""
        if self._remove is not None:
            remove, self._remove = self._remove, None
            remove()

    def _count(self) -> None:
        self._calls += 1
