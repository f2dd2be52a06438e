"""Paragraphs of the generated pages."""

from __future__ import annotations

import textwrap

__all__ = ["WIDTH", "prose"]

WIDTH = 119


def prose(text: str) -> list[str]:
    """The lines of a paragraph, however it was broken before; words and links stay whole."""
    return textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
