"""A page of headings, paragraphs, lists, tables and pictures, as Markdown and as HTML that say the same.

Words may hold ``**bold**``, ```code``` and ``[links](target)``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Page", "anchor"]

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .5rem; text-align: left; vertical-align: top }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
code { background: #f3f3f3; padding: 0 .2rem }
"""


def anchor(title: str) -> str:
    """What a heading is linked by, as Markdown readers make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@dataclass
class Page:
    """A page that grows from top to bottom.

    Attributes:
        title: of the page, its first heading.
    """

    title: str
    _markdown: list[str] = field(default_factory=list)
    _html: list[str] = field(default_factory=list)

    def heading(self, title: str, level: int = 2) -> None:
        """A heading; ``anchor`` is its link."""
        self._add(f"{'#' * level} {title}", f'<h{level} id="{anchor(title)}">{_inline(title)}</h{level}>')

    def say(self, words: str) -> None:
        """A paragraph."""
        self._add(words, f"<p>{_inline(words)}</p>")

    def items(self, words: Sequence[str]) -> None:
        """A list."""
        lines = "\n".join(f"<li>{_inline(one)}</li>" for one in words)
        self._add("\n".join(f"- {one}" for one in words), f"<ul>\n{lines}\n</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of words."""
        text = [_row(header), "|" + "---|" * len(header), *map(_row, rows)]
        lines = ["<table>", _cells(header, "th"), *(_cells(row, "td") for row in rows), "</table>"]
        self._add("\n".join(text), "\n".join(lines))

    def picture(self, title: str, svg: str, path: str) -> None:
        """A picture: the page of HTML holds it, Markdown links its file."""
        self._add(f"![{title}]({path})", f"<figure>{svg[svg.index('<svg') :]}</figure>")

    @property
    def markdown(self) -> str:
        """The page as Markdown."""
        return "\n\n".join([f"# {self.title}", *self._markdown]) + "\n"

    @property
    def html(self) -> str:
        """The page as HTML, with nothing outside of it."""
        title = html.escape(self.title)
        head = f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        style = f"<style>\n{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        return head + style + "\n".join(self._html) + "\n</body>\n</html>\n"

    def _add(self, markdown: str, text: str) -> None:
        self._markdown.append(markdown)
        self._html.append(text)


def _row(cells: Sequence[str]) -> str:
    words = " | ".join(cell.replace("|", "\\|") for cell in cells)
    return f"| {words} |"


def _cells(cells: Sequence[str], kind: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{_inline(cell)}</{kind}>" for cell in cells) + "</tr>"


def _inline(words: str) -> str:
    text = html.escape(words, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)
