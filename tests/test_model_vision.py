"""Hidden states and head of vision-language models, plain and wrapped by PEFT."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fused_po import linear_loss, losses, take_apart
from fused_po.trainers.model import hidden_and_head, token_stats_of

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
IMAGE, BEGIN, END = 55, 53, 54

Inputs = dict[str, Tensor]


def qwen2_vl() -> tuple[nn.Module, Inputs]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": None},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    pictures = {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    inputs = tokens(4) | pictures
    return transformers.Qwen2VLForConditionalGeneration(config), inputs | {
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()
    }


def llava() -> tuple[nn.Module, Inputs]:
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**EYE, image_size=8, projection_dim=8),
        image_token_index=IMAGE,
    )
    return transformers.LlavaForConditionalGeneration(config), tokens(4) | {"pixel_values": torch.randn(2, 3, 8, 8)}


def gemma3() -> tuple[nn.Module, Inputs]:
    config = transformers.Gemma3Config(
        # the outer model reads no softcap
        text_config={**TEXT, "head_dim": 16, "final_logit_softcapping": 2.0},
        vision_config={**EYE, "image_size": 16},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    inputs = tokens(4) | {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = transformers.Gemma3ForConditionalGeneration(config)
    # made as zeros
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def cohere2_vision() -> tuple[nn.Module, Inputs]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Cohere2VisionConfig(
        # the outer model reads no logit scale
        text_config=transformers.Cohere2Config(**TEXT, **ids, logit_scale=0.25),
        vision_config=transformers.SiglipVisionConfig(**EYE, image_size=16),
        image_token_id=IMAGE,
        alignment_intermediate_size=32,
    )
    model = transformers.Cohere2VisionForConditionalGeneration(config)
    return model, tokens(4) | {"pixel_values": torch.randn(2, 3, 16, 16)}


def tokens(count: int) -> Inputs:
    ids = torch.randint(3, 50, (2, 12))
    ids[:, 2], ids[:, 3 : 3 + count], ids[:, 3 + count] = BEGIN, IMAGE, END
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS = {"qwen2_vl": qwen2_vl, "llava": llava, "gemma3": gemma3, "cohere2_vision": cohere2_vision}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str, wrapped: bool) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    with torch.no_grad():
        # random heads of width 0.02 would not reach a softcap
        model.get_output_embeddings().weight.mul_(40)
        plain = model(**inputs).logits
        if wrapped:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        wanted = model(**inputs).logits
        backbone, head = hidden_and_head(model)
        torch.testing.assert_close(head.logits(backbone(**inputs)), wanted)
        assert torch.equal(wanted, plain) == (not wrapped)
        other = inputs | {"pixel_values": torch.randn_like(inputs["pixel_values"])}
        assert not torch.allclose(head.logits(backbone(**other)), wanted)


def test_a_step_on_images_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    model, inputs = qwen2_vl()
    model = model.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = inputs["input_ids"][:, 1:].clone()
    labels[:, :7] = -100
    reference = torch.tensor([-20.0, -21.0], dtype=torch.float64)
    logp = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    answers = (logp * (labels != -100)).sum(1)
    margin = 0.1 * ((answers - reference)[0] - (answers - reference)[1])
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(-nn.functional.logsigmoid(margin), parameters, allow_unused=True)
    backbone, head = hidden_and_head(model)
    out = linear_loss(
        backbone(**inputs)[:, :-1],
        head.weight,
        labels,
        losses.create("sigmoid", beta=0.1),
        ref_logp=reference,
        **head.options,
    )
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in wanted)
    for mine, want in zip(found, wanted, strict=True):
        assert (mine is None) == (want is None)
        if mine is not None:
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(token_stats_of(model, inputs, labels).logp.sum(1), answers.detach())


def test_an_adapter_that_adds_tokens() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**TEXT)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    ids = torch.randint(0, 60, (2, 5))
    hidden, head, _ = take_apart(model, input_ids=ids)
    want = model(input_ids=ids).logits
    assert hidden.shape == (2, 7, 32)
    torch.testing.assert_close(head.logits(hidden), want)
    with pytest.raises(
        ValueError, match=r"the model has 7 positions, and 4 labels want 5: an adapter that adds tokens"
    ):
        token_stats_of(model, {"input_ids": ids}, ids[:, 1:])


def test_the_decoder_of_two() -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    inputs = {"input_ids": torch.randint(1, 60, (2, 5)), "decoder_input_ids": torch.randint(1, 60, (2, 4))}
    hidden, head, outputs = take_apart(model.eval(), **inputs)
    assert hidden.shape == (2, 4, 16) and outputs.encoder_last_hidden_state.shape == (2, 5, 16)
    torch.testing.assert_close(head.logits(hidden), model(**inputs).logits)


def test_a_head_of_several_layers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(vocab_size=60, is_decoder=True, **sizes)).eval()
    ids = torch.randint(0, 60, (2, 5))
    hidden, head, _ = take_apart(model, input_ids=ids)
    torch.testing.assert_close(head.logits(hidden), model(ids).logits)
    # what the last of them meets
    assert head.bias is not None and not torch.equal(hidden, model.bert(ids).last_hidden_state)
