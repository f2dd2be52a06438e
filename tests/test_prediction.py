"""``predict_memory`` against what calls take."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from fused_po import linear_loss, linear_token_stats, losses
from fused_po.diagnostics import largest_length, peak_memory, predict_memory
from fused_po.diagnostics.prediction import ROUTES

MIB = 1 << 20
# tokens, H, V, budget: more horizons than fit, all fit, and a narrow head
SHAPES = [(2000, 64, 4000, 16 * MIB), (1000, 256, 6000, 64 * MIB), (6000, 32, 3000, 16 * MIB)]


def measured(shape, route: str, trainable: bool, entropy: bool, dtype: torch.dtype) -> int:
    tokens, width, vocab, budget = shape
    torch.manual_seed(0)
    hidden = torch.randn(2, tokens // 2, width).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(trainable)
    labels = torch.randint(vocab, (2, tokens // 2))

    def call() -> None:
        if route == "linear_loss":
            loss = losses.create("dapo", entropy_coef=0.1) if entropy else losses.create("sigmoid")
            inputs = {"advantage": torch.ones(2)} if entropy else {"ref_logp": torch.zeros(2)}
            linear_loss(hidden, weight, labels, loss, scratch_bytes=budget, **inputs).loss.backward()
            return
        if route == "linear_token_stats":
            outputs = ("logp", "entropy") if entropy else ("logp",)
            stats = linear_token_stats(hidden, weight, labels, outputs=outputs, scratch_bytes=budget)
            (stats.logp.sum() + (stats.entropy.sum() if entropy else 0.0)).backward()
            return

        def logp_and_entropy(logits):
            log_p = logits.float().log_softmax(-1)
            logp = log_p.gather(-1, labels.unsqueeze(-1)).sum()
            return logp - (log_p.exp() * log_p).sum() if entropy else logp

        logp_and_entropy(hidden @ weight.t()).backward()

    return peak_memory(call, "cpu")


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ROUTES)
def test_prediction_is_what_a_call_takes(route, shape, dtype):
    tokens, width, vocab, budget = shape
    for trainable, entropy in itertools.product((True, False), (False, True)):
        options = {"route": route, "trainable": trainable, "entropy": entropy, "dtype": dtype}
        predicted = predict_memory(tokens, width, vocab, scratch_bytes=budget, **options).above_inputs
        got = measured(shape, **options)
        assert abs(predicted - got) <= 0.15 * got + 4 * MIB, (options, predicted / MIB, got / MIB)


def test_memory_is_bounded_and_full_logits_grow():
    vocab, hidden = 131072, 4096
    predict = partial(predict_memory, hidden_size=hidden, vocab_size=vocab, dtype=torch.bfloat16, device="cuda")
    # the budget, and the room of one dW in float32
    bound = (1 << 30) + 4 * vocab * hidden
    spent = []
    for tokens in (512, 8192, 12000, 16384, 131072):
        found = predict(tokens)
        # a gradient that is not made yet leaves its room free
        spent.append(found.above_inputs - found.tokens - 2 * hidden * (tokens + vocab))
    assert max(spent) <= bound
    # equal chunks: of 5,504 rows and of 6,016
    assert spent[-1] <= spent[-2] * 6016 / 5504
    # 12 bytes a logit
    assert predict(vocab, route="full_logits").logits == 12 * vocab * vocab


def test_float32_dw_waits_beside_a_bfloat16_weight_where_chunks_add_to_it():
    predict = partial(predict_memory, hidden_size=512, vocab_size=4096, dtype=torch.bfloat16, device="cuda")
    found = predict(1 << 20, scratch_bytes=1 << 24)
    assert found.accumulator == 4 * 512 * 4096
    assert found.inputs == 2 * ((512 << 20) + 512 * 4096) + (8 << 20)
    # tiles of all rows take no more
    assert predict(64).accumulator == 0
    assert predict(1 << 20, trainable=False).accumulator == 0


def test_the_largest_length_fits_and_the_next_does_not():
    predict = partial(predict_memory, hidden_size=256, vocab_size=32000, route="full_logits")
    found = largest_length(4 << 30, predict)
    assert predict(found).peak <= 4 << 30 < predict(found + 1).peak
    assert largest_length(1000, predict) == 0
    fused = largest_length(4 << 30, partial(predict_memory, hidden_size=256, vocab_size=32000))
    assert fused > 50 * found


@pytest.mark.parametrize("change", [{"tokens": 0}, {"route": "magic"}])
def test_refusals(change):
    with pytest.raises(ValueError, match="positive|route must be one of linear_loss"):
        predict_memory(**({"tokens": 8, "hidden_size": 8, "vocab_size": 8} | change))
