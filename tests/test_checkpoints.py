"""G over saved checkpoints: the numbers of the models in memory, and nothing is loaded that does not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po import losses
from fused_po.diagnostics import Examples, alignment_over_checkpoints, check_checkpoints, gradient_alignment
from fused_po.trainers.loading import load_tokenizer

V, S = 32, 7


def tiny(seed: int, hidden: int = 16, layers: int = 1, vocab: int = V) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes)).eval()


def examples(seed: int, **side_inputs) -> Examples:
    torch.manual_seed(seed)
    ids = torch.randint(0, V, (4, S))
    labels = ids[:, 1:].clone()
    labels[:, :2] = -100
    return Examples({"input_ids": ids}, labels, side_inputs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (0, 1):
        tiny(seed).save_pretrained(folder / f"step-{seed}")
    return [folder / "step-0", folder / "step-1"]


LOSS = losses.create("sigmoid")
DATA, TARGET = [examples(1, ref_logp=torch.tensor([-1.0, -2.0, -3.0, -1.5]))], [examples(2)]


def test_g_is_that_of_the_models_in_memory(saved):
    found = alignment_over_checkpoints([str(folder) for folder in saved], DATA, LOSS, TARGET, method="exact")
    assert list(found) == saved
    for seed, alignment in enumerate(found.values()):
        want = gradient_alignment(tiny(seed), DATA, LOSS, TARGET, method="exact")
        assert alignment["whole"] == pytest.approx(want["whole"], rel=1e-6)
        assert alignment["positive"] == pytest.approx(want["positive"], rel=1e-6)


def test_batches_may_follow_the_policy(saved):
    seen = []

    def batches(model, folder):
        seen.append((folder, model.training))
        return DATA

    moving = alignment_over_checkpoints(saved, batches, LOSS, TARGET)
    fixed = alignment_over_checkpoints(saved, DATA, LOSS, TARGET)
    assert seen == [(folder, False) for folder in saved]
    assert [one["whole"] for one in moving.values()] == [one["whole"] for one in fixed.values()]


@pytest.mark.parametrize(
    "other, message",
    [
        (lambda: tiny(0, hidden=24), "is no checkpoint of the model"),
        (lambda: tiny(0, layers=2), r"only one of them has model\.layers\.1"),
        (lambda: tiny(0, vocab=48), "is no checkpoint of the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, tmp_path, other, message):
    other().save_pretrained(tmp_path / "other")

    def load(folder):
        raise AssertionError("nothing may be loaded")

    with pytest.raises(ValueError, match=message):
        alignment_over_checkpoints([*saved, tmp_path / "other"], DATA, LOSS, TARGET, load=load)


def test_folders_that_hold_no_checkpoint_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint given"):
        check_checkpoints([])
    with pytest.raises(ValueError, match="no such folder"):
        check_checkpoints([saved[0], tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        check_checkpoints([tmp_path / "empty"])
    tiny(0).config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"holds no model\*\.safetensors"):
        check_checkpoints([tmp_path / "empty"])
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="can't be read"):
        check_checkpoints([tmp_path / "empty"])


def test_a_target_of_another_tokenizer_is_refused(saved, tmp_path):
    beyond = examples(2)
    beyond.labels[0, 3] = V
    with pytest.raises(ValueError, match="another tokenizer"):
        alignment_over_checkpoints(saved, DATA, LOSS, [beyond])
    first, second = load_tokenizer("tiny", ["one two"]), load_tokenizer("tiny", ["drei vier fünf"])
    tiny(0).save_pretrained(tmp_path / "with")
    first.save_pretrained(tmp_path / "with")
    assert check_checkpoints([tmp_path / "with"], first) == V
    with pytest.raises(ValueError, match="is another than the given one"):
        check_checkpoints([tmp_path / "with"], second)
    tiny(0).save_pretrained(tmp_path / "else")
    second.save_pretrained(tmp_path / "else")
    with pytest.raises(ValueError, match="is another than that of"):
        check_checkpoints([tmp_path / "with", tmp_path / "else"])


def test_what_is_no_list_of_examples_is_refused_before_loading(saved):
    def load(folder):
        raise AssertionError("nothing is loaded")

    with pytest.raises(ValueError, match=r"batches \(D\) must be a list of Examples: got one Examples"):
        alignment_over_checkpoints(saved, DATA[0], LOSS, TARGET, load=load)
    with pytest.raises(ValueError, match=r"target \(D'\) must be a list of Examples: got one Examples"):
        alignment_over_checkpoints(saved, DATA, LOSS, TARGET[0], load=load)
    with pytest.raises(ValueError, match=r"batches \(D\) must be a list of Examples: got one Examples"):
        alignment_over_checkpoints(saved, lambda model, folder: DATA[0], LOSS, TARGET)


def test_an_empty_target_and_missing_side_inputs_are_refused_before_loading(saved):
    empty = examples(2)
    empty.labels[:] = -100
    with pytest.raises(ValueError, match="no loss token"):
        alignment_over_checkpoints(saved, DATA, LOSS, [empty], load=None)
    with pytest.raises(ValueError, match="no loss token"):
        alignment_over_checkpoints(saved, DATA, LOSS, [])
    with pytest.raises(ValueError, match="ref_logp"):
        alignment_over_checkpoints(saved, [examples(1)], LOSS, TARGET)
