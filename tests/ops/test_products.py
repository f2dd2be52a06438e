"""The table of products in README.md: how many of N H V a call takes, counted in half precision and in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_po import linear_loss, linear_token_stats, losses, make_plan
from fused_po.ledger import record

N, H, V = 4096, 256, 32000
SMALL = 64 << 20
BF16, FP32 = torch.bfloat16, torch.float32
ENTROPY = {"entropy_coef": 0.01}

# loss or None for statistics, hyper-parameters, sequences, budget, dtype, softcap; products with a trained head, at
# least and at most, and with a frozen one
TABLE: dict[str, tuple[str | None, dict[str, Any], int, int | None, torch.dtype, float | None, float, float, float]] = {
    "pairs": ("orpo", {}, 8, None, BF16, None, 3, 3, 2),
    "tokens": ("dapo", {}, 8, SMALL, BF16, None, 3, 3, 2),
    "one large pair, with a pattern": ("sigmoid", {}, 2, SMALL, BF16, None, 3, 3, 2),
    "one large pair, without": ("orpo", {}, 2, SMALL, BF16, None, 3.2, 4, 2),
    "statistics": (None, {}, 8, None, BF16, None, 3, 3, 2),
    "statistics, small budget": (None, {}, 8, SMALL, BF16, None, 3.2, 4, 2),
    "entropy": ("ppo", ENTROPY, 8, None, BF16, None, 3, 3, 2),
    "entropy, softcap": ("ppo", ENTROPY, 8, None, BF16, 30.0, 4, 4, 3),
    "entropy, softcap, float32": ("ppo", ENTROPY, 8, None, FP32, 30.0, 3, 3, 2),
    "statistics, entropy": (None, ENTROPY, 8, None, BF16, None, 3, 3, 4),
    "statistics, entropy, softcap": (None, ENTROPY, 8, None, BF16, 30.0, 4, 4, 4),
    "statistics, entropy, float32": (None, ENTROPY, 8, None, FP32, None, 4, 4, 4),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", TABLE)
def test_products(name: str, frozen: bool) -> None:
    loss, hyperparameters, sequences, scratch, dtype, softcap, least, most, with_frozen = TABLE[name]
    shape = (sequences, N // sequences)
    hidden = torch.empty(*shape, H, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(V, H, dtype=dtype, device="meta", requires_grad=not frozen)
    labels = torch.empty(shape, dtype=torch.int64, device="meta")
    tokens, per_sequence = torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta")
    options: dict[str, Any] = {"plan": make_plan(labels), "scratch_bytes": scratch, "softcap": softcap}
    with record() as ledger:
        if loss is None:
            outputs = ("logp", "entropy") if hyperparameters else ("logp",)
            stats = linear_token_stats(hidden, weight, labels, outputs=outputs, **options)
            torch.autograd.backward(list(stats.present().values()), [tokens] * len(outputs))
        else:
            made = losses.create(loss, **hyperparameters)
            known = {"ref_logp": per_sequence, "old_logp": tokens, "advantage": per_sequence}
            given = {key: known[key] for key in sorted(made.needs) if key in known}
            linear_loss(hidden, weight, labels, made, **options, **given).loss.backward()
    found = ledger.flops / (2 * N * H * V)
    if frozen:
        assert found == pytest.approx(with_frozen)
    else:
        assert least - 1e-9 <= found <= most + 1e-9
