"""Real model classes, adapters and wrappers through TRL's trainers: five steps each, with TRL's own numbers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from trl import DPOConfig, DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from fused_po import losses
from fused_po.trainers import trl as hooks
from fused_po.trainers.trl import FusedDPOTrainer, FusedGRPOTrainer, FusedKTOTrainer, one_pass
from tests.test_model_vision import MODELS as VISION
from tests.trainers.test_trl_hook import MODELS, OUTPUTS, build
from tests.trainers.trl_runs import PAIRS, TOKENIZER, assert_same, run, tiny

TRAINERS = {
    "kto": (KTOTrainer, FusedKTOTrainer),
    "grpo": (GRPOTrainer, FusedGRPOTrainer),
    "rloo": (RLOOTrainer, None),
    "sft": (SFTTrainer, None),
}
SETTINGS = {"rloo": {"beta": 0.0}}


@pytest.mark.parametrize("name", MODELS)
def test_dpo(name, tmp_path):
    def model():
        return build(name, vocab=len(TOKENIZER))

    theirs = run("dpo", DPOTrainer, tmp_path, model=model)
    assert_same(run("dpo", DPOTrainer, tmp_path, model=model, enable=True), theirs)
    assert_same(run("dpo", FusedDPOTrainer, tmp_path, model=model), theirs)


# tied and capped, scaled, with a load-balancing loss, plain
@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Mixtral", "Qwen3"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_other_trainers(kind, name, tmp_path):
    def model():
        return build(name, vocab=len(TOKENIZER))

    trainer, fused = TRAINERS[kind]
    settings = SETTINGS.get(kind, {})
    theirs = run(kind, trainer, tmp_path, model=model, **settings)
    assert_same(run(kind, trainer, tmp_path, model=model, enable=True, **settings), theirs)
    if fused is not None:
        assert_same(run(kind, fused, tmp_path, model=model, **settings), theirs)


# experts have no float64 on a CPU
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"Mixtral"}))
def test_log_probs_of_tokens_are_those_of_float64(name):
    """One by one: what shifts all of them alike moves no advantage and no margin."""
    model = build(name)
    add_fused_lm_head(model, temperature=0.8, outputs=OUTPUTS)
    ids = torch.randint(3, 89, (3, 7))
    with torch.no_grad(), hooks.enable():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        truth = build(name).double()(input_ids=ids).logits[:, :-1] / 0.8
    truth = truth.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=2e-6)


def compiled() -> nn.Module:
    model = tiny()
    model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_compiled_backbone(kind, tmp_path):
    trainer, fused = TRAINERS.get(kind, (DPOTrainer, FusedDPOTrainer))
    theirs = run(kind, trainer, tmp_path)
    assert_same(run(kind, trainer, tmp_path, model=compiled, enable=True), theirs)
    assert_same(run(kind, fused, tmp_path, model=compiled), theirs)


def test_a_model_that_the_trainer_compiles(tmp_path):
    theirs = run("dpo", DPOTrainer, tmp_path)
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert_same(run("dpo", DPOTrainer, tmp_path, enable=True, **settings), theirs)
    assert_same(run("dpo", FusedDPOTrainer, tmp_path, **settings), theirs)


@pytest.mark.parametrize("trainer", [DPOTrainer, FusedDPOTrainer])
def test_an_adapter_on_the_head_is_refused(trainer, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with hooks.enable(), pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trainer(
            model=tiny(),
            args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=TOKENIZER,
            peft_config=adapter,
        )


def test_a_head_that_is_trained_beside_an_adapter(tmp_path):
    """PEFT's ``modules_to_save``: the copy of the head is the one that counts and learns."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    made = []

    class Plain(DPOTrainer):
        def __init__(self, *args, peft_config, **kwargs):
            super().__init__(*args, peft_config=config, **kwargs)
            made.append(self.model)

    class Fused(FusedDPOTrainer, Plain):
        pass

    theirs = run("dpo", Plain, tmp_path, lora=True)
    assert_same(run("dpo", Plain, tmp_path, lora=True, enable=True), theirs)
    assert_same(run("dpo", Fused, tmp_path, lora=True), theirs)
    head = made[-1].get_output_embeddings()
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


@pytest.mark.parametrize("name", VISION)
def test_pictures_through_the_head(name):
    """Every output and gradient of TRL's fused head on vision-language classes."""
    torch.manual_seed(0)
    model, inputs = VISION[name]()
    model.eval()
    add_fused_lm_head(model, outputs=OUTPUTS)
    labels = inputs["input_ids"].clone()
    labels[:, :8] = -100
    found = []
    for ours in (False, True):
        with hooks.enable() if ours else nullcontext():
            out = model(**inputs, labels=labels, fused_lm_head=True)
            (out.log_probs.sum() + 0.1 * out.entropy.sum()).backward()
            assert (hooks.calls() == 1) == ours
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((out, gradients))
    (theirs, wanted), (mine, got) = found
    for field in OUTPUTS[:-1]:
        torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), rtol=1e-5, atol=1e-5)
    assert wanted.keys() == got.keys() and any("vis" in parameter for parameter in wanted)
    for parameter, gradient in wanted.items():
        assert (got[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, parameter


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_dpo_of_a_vision_language_model(name, tmp_path):
    def model():
        torch.manual_seed(0)
        made = VISION[name]()[0]
        made.resize_token_embeddings(len(TOKENIZER))
        return made

    theirs = run("dpo", DPOTrainer, tmp_path, model=model)
    assert_same(run("dpo", DPOTrainer, tmp_path, model=model, enable=True), theirs)
    assert_same(run("dpo", FusedDPOTrainer, tmp_path, model=model), theirs)


def test_data_parallel_is_refused():
    call = one_pass.OnePass(losses.create("sigmoid"), torch.zeros(2, 3, dtype=torch.int64), {})
    with pytest.raises(ValueError, match="DataParallel hands each replica a part of the pairs"):
        one_pass.Policy(nn.DataParallel(tiny()), call)


def test_a_head_on_another_device_is_refused():
    call = one_pass.OnePass(losses.create("sft"), torch.zeros(2, 3, dtype=torch.int64), {})
    weight = torch.zeros(5, 4, device="meta")
    with pytest.raises(ValueError, match="all tensors must be on one device: the first is on cpu, weight on meta"):
        call(torch.zeros(6, 4), weight, torch.zeros(6, dtype=torch.int64), ("logp",))
