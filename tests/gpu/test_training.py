"""Training on a GPU: ``fused-po train`` takes its steps there, beside full logits too."""

from __future__ import annotations

import json

import pytest

from fused_po.cli import main
from tests.test_train import WORDS, small_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("more", [["--compare"], ["--dtype", "bfloat16"], ["--loss", "kto"], ["--fp16"]])
def test_training_takes_its_steps(tmp_path, more):
    rows = [{"prompt": f"Is it {w}?", "chosen": f"Yes, it is {w}.", "rejected": "Go away now."} for w in WORDS]
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["train", "--model", small_model(tmp_path), "--data", str(data), "--eval-data", str(data), "--steps", "3"]
    assert main([*given, "--batch-size", "2", "--device", "cuda", "--output", str(output), *more]) == 0
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["split"] == "train"] == [1, 2, 3]
    assert (output / "model").is_dir()
