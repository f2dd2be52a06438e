"""JSON that benchmarks wrote, and the table of block sizes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from bench import targets as promised
from bench import tune
from fused_po.bench.cases import groups
from fused_po.kernels import configs
from tests.fuzz.readers.common import Target, check_sentence, refusing

__all__ = ["RESULTS"]


def refused(run: Callable[[], int | None], code: int = 2) -> None:
    """A main that ends with 0 or 1, or refuses with a line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = run()
    if found == code:
        check_sentence(err.getvalue().rstrip("\n"))
    else:
        assert found in (0, 1)


def goals(data: bytes, folder: Path) -> None:
    """``python -m bench.targets``."""
    path = folder / "run.json"
    path.write_bytes(data)
    with mock.patch.object(sys, "argv", ["targets", str(path)]):
        refused(promised.main)


def tuned(data: bytes, folder: Path) -> None:
    """``python -m bench.tune --write``: of two runs one is right."""
    paths, table = [folder / "a.json", folder / "b.json"], folder / "configs.json"
    for path, content in zip(paths, (data, TUNED), strict=True):
        path.write_bytes(content)
    before = configs.TABLE.read_bytes()
    table.write_bytes(before)
    with mock.patch.object(configs, "TABLE", table):
        refused(lambda: tune.main(["--write", *map(str, paths)]))
    # whatever is taken, and where nothing is, the table can be used
    of_table(table.read_bytes(), folder, refuse=False)


def of_table(data: bytes, folder: Path, refuse: bool = True) -> None:
    """Sizes by a table: powers of two and warps, or a refusal that names it."""
    path = folder / "table.json"
    path.write_bytes(data)
    configs._table.cache_clear()
    with (
        mock.patch.object(configs, "TABLE", path),
        refusing(ValueError, str(path)) if refuse else contextlib.nullcontext(),
    ):
        for kernel in configs.KERNELS:
            for name in ("default", "sm_90"):
                for width in (1, 257, 128256):
                    block, warps = configs.block_and_warps(kernel, width, name)
                    assert block & (block - 1) == 0 and 1 <= warps <= 32, (kernel, block, warps)
    configs._table.cache_clear()


def times(kernel: str, fast: float) -> dict[str, object]:
    candidate = json.dumps({"BLOCK": 1024, "num_warps": 4})
    return {"kernel": kernel, "architecture": "sm_90", "times": {"default": {"ms": 1.0}, candidate: {"ms": fast}}}


TUNED = json.dumps({"results": [times(kernel, 0.5) for kernel in tune.KERNELS]}).encode()
CASES = [case.name for group in ("targets", "pairs") for case in groups("cuda")[group]]
METHODS = {
    "linear_loss": {"ms": 1.0, "ours": True, "scratch_bytes": 1, "tile_bytes": 1},
    "trl": {"ms": 2.0, "ours": False, "scratch_bytes": 2, "tile_bytes": 1},
}
RUN = json.dumps(
    {
        "environment": {"device": "NVIDIA H100"},
        "results": [{"case": name, "methods": METHODS, "floor": {"ms": 1.0}} for name in CASES[:3]],
    }
).encode()
RESULTS = {
    "targets": Target(goals, (RUN, b"{}", b"[]"), ('"methods"', '"floor"', '"ms"', '"ours"', "null", *CASES[:2])),
    "tune": Target(tuned, (TUNED, b"{}", b"[]"), ('"kernel"', '"times"', '"ms"', '"architecture"', "null", "0")),
    "table": Target(of_table, (configs.TABLE.read_bytes(), b"{}", b'{"default": {}}'), ('"BLOCK"', '"num_warps"')),
}
