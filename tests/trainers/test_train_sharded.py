"""``fused-po train`` under FSDP2 on two CPU processes, saved and resumed, beside one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.nightly
def test_fsdp2_is_one_process():
    """The script compares; a launcher of two processes must be the parent of both."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["tests/oracles/compare_sharded_train.py", "fsdp2", "sigmoid", "kto", "dapo", "sft"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("weights") == 8
