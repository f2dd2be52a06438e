"""Lines of JSON that a kill may cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fused_po.trainers.whole import add_line, begin_lines, begun, json_lines, unfinished


def test_lines_that_were_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert json_lines(path) == []
    begin_lines(path)
    rows = [{"text": "a\u2028b\u0085c\n"}, {"number": 0.1}]
    for row in rows:
        add_line(path, row)
    assert json_lines(path) == rows
    # as a file has them that is written for people
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows) + '{"cut', encoding="utf-8")
    assert json_lines(path) == rows
    begin_lines(path)
    add_line(path, 3)
    assert json_lines(path) == [*rows, 3]
    assert [one.name for one in tmp_path.iterdir()] == ["lines.jsonl"]
    path.write_text('{"cut\n{}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"lines.jsonl: line 1 is not JSON"):
        json_lines(path)


def test_what_a_kill_left_is_no_beginning(tmp_path: Path) -> None:
    assert not begun(tmp_path / "x") and not begun(tmp_path)
    unfinished(tmp_path / "settings.json").touch()
    assert not begun(tmp_path)
    (tmp_path / "settings.json").touch()
    assert begun(tmp_path)
