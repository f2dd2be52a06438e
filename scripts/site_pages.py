"""Pages of the site that are no files of docs/: a hook of MkDocs, which mkdocs.yml names.

The start page is README.md, as it is in the repository; contributing and changes likewise. The reference lists the
public names of the package, with their docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# pages by their file in the repository
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)\s#:]+\.md)((?:#[^)\s]*)?\))")
# modules whose public names belong to the reference though the package does not export them itself
MODULES = ("advantages", "splits", "losses", "diagnostics", "trainers.trl")


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / name).read_text(encoding="utf-8"), "")))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = Path(page.file.src_uri).parent.as_posix()
    return markdown if page.file.src_uri in PAGES.values() else _moved(markdown, f"docs/{folder}")


def reference() -> str:
    """The page in the words of mkdocstrings: the exports of the package, then those of its public modules."""
    import fused_po

    names = [name for name in fused_po.__all__ if name not in MODULES and not name.startswith("__")]
    # where each is defined: a module may have the name of what it defines
    found = [getattr(fused_po, name) for name in names]
    lines = ["# Reference", "", "## fused_po", "", *(f"::: {one.__module__}.{one.__qualname__}\n" for one in found)]
    for module in MODULES:
        lines += [f"## fused_po.{module}", "", f"::: fused_po.{module}", "    options:"]
        lines += ["      show_root_heading: false", "      show_root_toc_entry: false", ""]
    return "\n".join(lines)


def _moved(markdown: str, folder: str) -> str:
    """Links between files of the repository as links between pages of the site; ``folder`` is that of the file."""

    def moved(link: re.Match[str]) -> str:
        target = (ROOT / folder / link[2]).resolve()
        name = target.relative_to(ROOT).as_posix()
        page = PAGES.get(name, name.removeprefix("docs/"))
        up = "../" * len([part for part in Path(folder).parts[1:] if part != "."])
        return f"{link[1]}{up}{page}{link[3]}"

    return LINK.sub(moved, markdown)
