"""What targets share: drawing from bytes, and the promise of a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Draw", "Target", "refusing"]

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        run: takes bytes and an empty folder.
        seeds: bytes to begin with.
        words: that a mutation may put in.
    """

    run: Callable[[bytes, Path], None]
    seeds: tuple[bytes, ...] = (b"",)
    words: tuple[str, ...] = ()


class Draw:
    """Choices that bytes make; 0 once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._left = iter(data)
        self.count = len(data)

    def byte(self) -> int:
        self.count -= 1
        return next(self._left, 0)

    def number(self, below: int) -> int:
        return (self.byte() << 8 | self.byte()) % below if below > 256 else self.byte() % below

    def one(self, of: Sequence[T]) -> T:
        return of[self.number(len(of))]

    def rest(self) -> bytes:
        return bytes(self._left)


@contextmanager
def refusing(error: type[Exception], names: str = "") -> Iterator[None]:
    """Within, an error of that type is a refusal if it is one sentence that names what it must."""
    try:
        yield
    except error as refusal:
        check_sentence(str(refusal), names)


def check_sentence(text: str, names: str = "") -> None:
    assert text.strip(), "an error without words"
    assert "\n" not in text, f"more than one line: {text!r}"
    assert len(text) < 2000, f"{len(text)} characters: {text[:200]!r}"
    assert names in text, f"does not name {names!r}: {text!r}"


def replaced(base: dict[str, bytes], data: bytes, folder: Path) -> str:
    """Write files, one of which the data replaces, cuts or changes in one place; the name of that file."""
    draw = Draw(data)
    names = sorted(base)
    victim, way = draw.one(names), draw.number(3)
    content = base[victim]
    if way == 0:
        content = draw.rest()
    elif way == 1:
        content = content[: draw.number(len(content) + 1)]
    else:
        place, length = draw.number(len(content) + 1), draw.number(64)
        content = content[:place] + draw.rest() + content[place + length :]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if name == victim else base[name])
    return victim


def files_of(folder: Path) -> dict[str, bytes]:
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def lazily(make: Callable[[], Any]) -> Callable[[], Any]:
    """What is made once, when it is first asked for."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get
