"""The check of a model against its own logits: what it lets through, what it leaves alone, what it says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fused_po import take_apart
from fused_po.trainers.model import hidden_and_head, run_apart, token_stats_of
from fused_po.trainers.seam import deferred
from tests.test_model import Sly

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# more tokens than the check looks at
IDS = torch.arange(48).view(2, 24) % 37

pytestmark = pytest.mark.filterwarnings("error:.*logits")


def tiny(kind: Any = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(vocab_size=40, num_key_value_heads=2, **SIZES)).eval()


def own_log_probs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    return model(IDS).logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def test_a_head_of_zeros():
    model = tiny()
    nn.init.zeros_(model.lm_head.weight)
    assert not take_apart(model, input_ids=IDS)[1].weight.any()


def test_labels_given_to_the_model():
    model = tiny()
    torch.testing.assert_close(take_apart(model, input_ids=IDS, labels=IDS)[2].loss, model(IDS, labels=IDS).loss)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes)).eval()
    # its decoder reads the labels
    found = take_apart(model, input_ids=IDS, labels=IDS)[2]
    torch.testing.assert_close(found.loss, model(input_ids=IDS, labels=IDS).loss)


def test_a_cache_holds_what_one_forward_puts_there():
    model, cache = tiny(), DynamicCache()
    with torch.no_grad():
        hidden, head, _ = take_apart(model, input_ids=IDS[:, :5], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(head.logits(hidden), model(IDS[:, :5]).logits)
        hidden, head, _ = take_apart(model, input_ids=IDS[:, 5:], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(head.logits(hidden), model(IDS).logits[:, 5:])


def test_what_a_forward_counts_is_counted_once():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.over = nn.BatchNorm1d(16)

        def forward(self, hidden):
            return self.over(hidden.reshape(-1, 16)).view_as(hidden)

    model = tiny().train()
    model.model.norm = Norm()
    plain = copy.deepcopy(model)
    plain(IDS)
    take_apart(model, input_ids=IDS)
    assert model.model.norm.over.num_batches_tracked == 1
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_no_check_within_a_seam():
    model = tiny(Sly)
    with deferred(model):
        assert take_apart(model, input_ids=IDS)[0].shape == (2, 24, 16)
    with pytest.raises(ValueError, match="Sly is not a head on its last hidden states"):
        take_apart(model, input_ids=IDS)


def test_a_seam_around_keeps_its_options():
    model = tiny()
    with deferred(model, {"backend": "nonsense"}), pytest.raises(ValueError, match="nonsense"):
        token_stats_of(model, {"input_ids": IDS}, IDS[:, 1:])


def test_rows_that_are_no_numbers():
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[36] = torch.nan
    # the whole of the second sequence, and nothing else
    ids = torch.stack([IDS[0], torch.full((24,), 36)])
    found = token_stats_of(model, {"input_ids": ids}, ids[:, 1:]).logp
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_nothing_to_check_is_checked_later():
    model = tiny(Sly)
    with torch.no_grad():
        model.model.embed_tokens.weight[38] = torch.nan
    assert take_apart(model, input_ids=torch.full_like(IDS, 38))[0].isnan().all()
    with pytest.raises(ValueError, match="Sly is not a head"):
        take_apart(model, input_ids=IDS)


class ByName(LlamaForCausalLM):
    """Calls its head by the name of its argument."""

    def forward(self, input_ids, **kwargs):
        return {"logits": self.lm_head(input=self.model(input_ids)[0])}


class Bare(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).to_tuple()


def test_outputs_without_names():
    model = tiny(Bare)
    hidden, head, outputs = take_apart(model, input_ids=IDS)
    torch.testing.assert_close(head.logits(hidden), model(IDS)[0])
    assert outputs[0].now is None


class Biased(nn.Linear):
    def forward(self, input):
        return functional.linear(input, self.weight, bias=self.bias)


@pytest.mark.parametrize("biased", [False, True])
def test_a_head_that_is_called_by_name(biased):
    model = tiny(ByName)
    if biased:
        model.lm_head = Biased(16, 40)
    hidden, head, _ = take_apart(model, input_ids=IDS)
    assert (head.bias is not None) == biased
    torch.testing.assert_close(head.logits(hidden), model(IDS)["logits"])


def test_statistics_are_in_the_precision_of_the_model():
    """accelerate leaves the autocast with the model's forward."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with deferred(model):
        want = model(input_ids=IDS, use_cache=False).logits[:, :-1].logp(IDS[:, 1:])
    assert torch.equal(token_stats_of(model, {"input_ids": IDS}, IDS[:, 1:]).logp, want)
    hidden, head, _ = take_apart(model, input_ids=IDS)
    rounded = hidden[:, :-1].bfloat16().double() @ head.weight.bfloat16().double().t()
    exact = rounded.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    assert (want - exact).abs().max() < 1e-3


@pytest.mark.filterwarnings("default")
def test_why_logits_are_made_is_said_once_and_truly():
    inner = tiny()
    model = nn.DataParallel(inner)
    with pytest.warns(UserWarning) as caught:
        found = token_stats_of(model, {"input_ids": IDS}, IDS[:, 1:]).logp
    assert [str(one.message)[:36] for one in caught] == ["full logits are made: DataParallel's"]
    torch.testing.assert_close(found, own_log_probs(inner, IDS[:, 1:]))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="are made, DataParallel's copies"):
        take_apart(model, input_ids=IDS)

    class Clamped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits.clamp(max=1.0)
            return found

    model = tiny(Clamped)
    with pytest.warns(UserWarning) as caught:
        token_stats_of(model, {"input_ids": IDS}, IDS[:, 1:])
    assert ["clamp" in str(one.message) for one in caught] == [True]
    with pytest.warns(UserWarning), deferred(model):
        assert "does clamp to them" in run_apart(model, {"input_ids": IDS}).why


def test_a_head_that_is_not_known_yet_can_be_looked_at():
    model = tiny()
    backbone, head = hidden_and_head(model)
    assert not hasattr(head, "softcap") and copy.deepcopy(head).weight.shape == (40, 16)
    with pytest.raises(ValueError, match="call the backbone first"):
        _ = head.options
    hidden = backbone(input_ids=IDS)
    assert head.softcap is None and head.vocab_size is None
    # what it holds of the weight is the layer's own
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(head.logits(hidden), model(IDS).logits)
    assert head.options["bias"] is None and copy.deepcopy(head).logit_scale == 1.0
