"""What a study of a pretrained model takes on paper, against what is counted."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po import linear_loss, losses, take_apart
from fused_po.diagnostics import peak_memory
from fused_po.study.real_memory import needs
from fused_po.study.real_settings import RealSettings


@pytest.mark.parametrize("checkpointed", [True, False])
def test_memory_on_paper_is_what_is_counted(checkpointed: bool) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2000, **sizes)
    short = {"max_length": 192, "max_new_tokens": 16, "micro_batch": 4}
    settings = RealSettings("m", "d", dtype="float32", device="cpu", gradient_checkpointing=checkpointed, **short)
    before = config.to_dict()
    found = needs(settings, config).memory["dpo update"]
    assert config.to_dict() == before
    model = LlamaForCausalLM(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, loss = torch.randint(2000, (4, 192)), losses.create("sigmoid")

    def update() -> None:
        hidden, head, _ = take_apart(model, input_ids=ids, attention_mask=torch.ones_like(ids))
        linear_loss(hidden[:, :-1], head.weight, ids[:, 1:], loss, ref_logp=torch.zeros(4)).loss.backward()

    # the first call compares and compiles
    update()
    model.zero_grad()
    predicted = found["gradients"] + found["activations and logits"]
    assert predicted == pytest.approx(peak_memory(update, "cpu"), rel=0.1)
    parameters = sum(one.numel() for one in model.parameters())
    assert (found["weights"], found["optimizer"]) == (4 * parameters, 8 * parameters)
