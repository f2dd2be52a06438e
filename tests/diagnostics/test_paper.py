"""What G takes, on paper, against what is counted."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench import paper_g
from fused_po import losses
from fused_po.cli.g_models import checkpointed
from fused_po.diagnostics import Examples, gradient_alignment, peak_memory, predict_alignment

LOSS = losses.create("sigmoid")
LLAMA = LlamaConfig(
    vocab_size=4000, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
    tie_word_embeddings=False,
)  # fmt: skip
QWEN = Qwen3Config(
    vocab_size=6000, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
)  # fmt: skip
KINDS = {"llama": (LlamaForCausalLM, LLAMA), "qwen": (Qwen3ForCausalLM, QWEN)}


def pairs(count: int, width: int, vocab: int) -> Examples:
    torch.manual_seed(0)
    ids = torch.randint(0, vocab, (count, width))
    return Examples(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids[:, 1:], {"ref_logp": torch.zeros(count)}
    )


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("method", ["exact", "directional"])
@pytest.mark.parametrize("kind, remade", [("llama", False), ("llama", True), ("qwen", False)])
def test_the_peak_is_within_10_percent_of_what_is_counted(kind, remade, method, cosine):
    make, config = KINDS[kind]
    data, target = pairs(8, 160, config.vocab_size), pairs(4, 120, config.vocab_size)
    prepare = checkpointed if remade else (lambda model: model)
    with torch.device("meta"):
        paper = prepare(make(config).eval())
    options = {"method": method, "cosine": cosine}
    found = predict_alignment(paper, [data], LOSS, [target], device="cpu", **options)
    model = prepare(make(config).eval())

    def call():
        # the parts do not matter to the peak, only to the time
        return gradient_alignment(model, [data], LOSS, [target], parts=("whole", "positive", "top"), **options)

    held = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    counted = held + peak_memory(call, "cpu")
    assert found.model == held
    assert abs(found.peak - counted) <= 0.1 * counted, (found.peak / counted, counted)


def test_only_the_largest_batch_counts():
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA).eval()
    small, large, target = pairs(2, 60, 4000), pairs(8, 160, 4000), pairs(4, 50, 4000)
    one = predict_alignment(model, [large], LOSS, [target], device="cpu")
    assert predict_alignment(model, [small, large, small], LOSS, [target, target], device="cpu") == one
    assert predict_alignment(model, [small], LOSS, [target], device="cpu").peak < one.peak


def test_a_model_with_values_is_refused():
    with pytest.raises(ValueError, match='the model must be on "meta"'):
        predict_alignment(LlamaForCausalLM(LLAMA), [pairs(2, 9, 99)], LOSS, [pairs(2, 9, 99)])


@pytest.mark.parametrize("method", ["exact", "directional"])
def test_activations_that_are_made_again_change_memory_and_not_g(method):
    config = LlamaConfig(**{**LLAMA.to_dict(), "attention_dropout": 0.5, "num_hidden_layers": 4})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    data, target = pairs(8, 120, 4000), pairs(2, 30, 4000)

    def measure():
        return gradient_alignment(model, [data], LOSS, [target], method=method, parts=("whole", "top"), cosine=True)

    plain, before = measure(), peak_memory(measure, "cpu")
    checkpointed(model)
    remade, after = measure(), peak_memory(measure, "cpu")
    # in eval mode all the same: dropout would change every number
    for part in ("whole", "top"):
        assert remade[part] == pytest.approx(plain[part], rel=1e-4)
    assert after < 0.8 * before


GPU = 80e9


@pytest.mark.parametrize("method", paper_g.METHODS)
def test_qwen3_1_7b_fits_one_gpu_of_80_gb(method):
    """128 pairs of 512 tokens, in batches; room for a context and libraries is left."""
    for row in paper_g.read()["Qwen3-1.7B"][method].values():
        assert 4 * 1.7e9 < row["model"] < 4 * 1.75e9
        assert row["peak"] < 0.9 * GPU


@pytest.mark.nightly
@pytest.mark.parametrize("method", paper_g.METHODS)
def test_what_is_recorded_is_counted_still(method):
    smallest = paper_g.BATCHES[0]
    recorded = paper_g.read()["Qwen3-1.7B"][method][str(smallest)]
    assert paper_g.count("Qwen3-1.7B", method, smallest)["peak"] == pytest.approx(recorded["peak"], rel=0.02)


def test_layers_and_batches_add_what_they_hold():
    """The count grows by a layer's weights, in the copies that a method keeps, and with the answers at once."""
    # what kind each layer is, newer versions of transformers want of each
    given = {**QWEN.to_dict(), "num_hidden_layers": 2, "layer_types": None}
    few = Qwen3Config(**given)

    def peak(config, count, method):
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config).eval()
        data = pairs(count, 100, 6000)
        return predict_alignment(model, [data], LOSS, [data], method=method)

    for method in paper_g.METHODS:
        one, more = peak(few, 4, method), peak(QWEN, 4, method)
        layer = more.model - one.model
        assert layer > 0 and more.above - one.above > layer
        assert peak(QWEN, 16, method).above > 1.2 * more.above
