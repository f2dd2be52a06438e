"""Held-out rows that do not fill a batch of one rank, on two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import distributed as dist

from fused_po import losses
from tests.forked import on_ranks
from tests.test_preference_trainer import model_of, rows, trainer_of


def evaluated(folder: Path, name: str) -> dict[str, float]:
    loss = losses.create(name)
    return trainer_of(folder, loss, None, rows(3), reference=model_of(1), per_device_eval_batch_size=4).evaluate()


def on_rank(rank: int, folder: str, wanted: dict[str, dict[str, float]]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, want in wanted.items():
        found = evaluated(Path(folder), name)
        assert found.keys() == want.keys()
        for metric, value in want.items():
            timed = metric.endswith(("_runtime", "_per_second", "_preparation_time"))
            assert timed or found[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    dist.barrier()


def test_a_rank_without_rows_does_not_hold_up_the_others(tmp_path):
    """It has none that count, and names the same metrics."""
    on_ranks(on_rank, 2, tmp_path, str(tmp_path), {name: evaluated(tmp_path, name) for name in ("sigmoid", "kto")})
