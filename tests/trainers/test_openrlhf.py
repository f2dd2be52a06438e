"""OpenRLHF's functions by their formulas in float64: log-probs, entropies, an actor's forward, and its losses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_po import advantages, losses, stats_loss, token_stats
from fused_po.stats import Stats
from fused_po.trainers import openrlhf
from tests.test_model_vision import llava

B, S, V = 3, 8, 41
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def close(mine, want, leaf):
    torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-12)
    upstream = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    found, wanted = (torch.autograd.grad((value * upstream).sum(), leaf, retain_graph=True) for value in (mine, want))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(B, S), (1, S), (S,), (2, B, S)])
def test_log_probs_and_entropy(shape, temperature):
    torch.manual_seed(0)
    logits = (3 * torch.randn(*shape, V, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, V, shape)
    before = logits.detach().clone()
    everything = (logits / temperature).log_softmax(-1)
    wanted = everything.gather(-1, labels[..., None])[..., 0]
    close(openrlhf.log_probs_from_logits(logits, labels, temperature), wanted, (logits,))
    if temperature == 1.0:
        close(openrlhf.compute_entropy(logits), -(everything.exp() * everything).sum(-1), (logits,))
    assert torch.equal(logits.detach(), before)


def test_temperatures_per_token_and_half_precision():
    torch.manual_seed(0)
    logits, labels = torch.randn(B, S, V).bfloat16(), torch.randint(0, V, (B, S))
    temperature = torch.rand(B, S) + 0.5
    found = openrlhf.log_probs_from_logits(logits, labels, temperature)
    wanted = (logits.double() / temperature.double()[..., None]).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert found.dtype == openrlhf.compute_entropy(logits).dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def model_of(name):
    torch.manual_seed(0)
    if name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        # random heads of width 0.02 would not reach a softcap
        model.lm_head.weight.mul_(40)
    if name == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.double().eval()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "lora"])
def test_an_actor(name, masked):
    """What the forward of OpenRLHF's actor does, step by step, on left-padded prompts."""
    model = model_of(name)
    sequences = torch.randint(3, V, (B, S))
    attention_mask = torch.ones_like(sequences)
    if name != "gemma2":
        # of which a position that sees nothing has NaN gradients in transformers
        attention_mask[1, :3] = 0
    action_mask = torch.ones(B, 4, dtype=torch.long)
    action_mask[2, 3:] = 0
    positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    logits = model(sequences, attention_mask=attention_mask, position_ids=positions).logits / 0.7
    everything = logits.log_softmax(-1)
    logp = everything.gather(-1, sequences.roll(-1, 1)[..., None])[:, :-1, 0]
    entropy = -(everything.exp() * everything).sum(-1)[:, :-1]
    if masked:
        logp, entropy = (value[:, -4:] * action_mask for value in (logp, entropy))
    given = (model, sequences, action_mask if masked else None, attention_mask)
    found = openrlhf.actor_log_probs(*given, temperature=0.7, return_entropy=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mine, want in zip(found, (logp, entropy), strict=True):
        close(mine, want, parameters)
    assert torch.equal(openrlhf.actor_log_probs(*given, temperature=0.7), found[0])


def test_an_actor_that_sees_images():
    torch.manual_seed(0)
    model, inputs = llava()
    model.eval()
    with torch.no_grad():
        found = openrlhf.actor_log_probs(
            model, inputs["input_ids"], None, inputs["attention_mask"], pixel_values=inputs["pixel_values"]
        )
        logits = model(**inputs).logits[:, :-1]
    wanted = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(B, S), (B - 1, 2), (4,)])
def test_an_action_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"action_mask must be \(3, A\) with A < 8: got "):
        openrlhf.actor_log_probs(model_of("llama"), torch.zeros(B, S, dtype=torch.long), torch.ones(shape))


class Rollout:
    """Log-probs that moved, with another number of actions in each sequence."""

    def __init__(self):
        torch.manual_seed(0)
        self.mask = torch.arange(S) < torch.tensor([8, 3, 5])[:, None]
        self.labels = torch.where(self.mask, 0, -100)
        self.logp = (-3 * torch.rand(B, S, dtype=torch.float64)).requires_grad_()
        self.old = self.logp.detach() + 0.3 * torch.randn(B, S, dtype=torch.float64)
        self.rollout = self.old + 0.4 * torch.randn(B, S, dtype=torch.float64)
        self.advantage = torch.randn(B, S, dtype=torch.float64)

    def __call__(self, loss, **given):
        """No metrics are wanted, so the entropy is not either."""
        stats = Stats(logp=self.logp)
        return stats_loss(stats, self.labels, loss, old_logp=self.old, advantage=self.advantage, **given).loss

    def clipped(self, ratio, low, high):
        return -torch.minimum(ratio * self.advantage, ratio.clamp(1 - low, 1 + high) * self.advantage)

    def mean(self, values, per_token):
        values = torch.where(self.mask, values, 0.0)
        return values.sum() / self.mask.sum() if per_token else (values.sum(1) / self.mask.sum(1)).mean()


@pytest.mark.parametrize("dual_clip", [None, 1.3])
@pytest.mark.parametrize("per_token", [False, True])
def test_policy_loss(per_token, dual_clip):
    rollout = Rollout()
    terms = rollout.clipped((rollout.logp - rollout.old).exp(), 0.1, 0.2)
    if dual_clip is not None:
        bounded = torch.minimum(terms, -dual_clip * rollout.advantage)
        assert (bounded != terms).any()
        terms = torch.where(rollout.advantage < 0, bounded, terms)
    loss = openrlhf.policy_loss(0.1, 0.2, dual_clip, token_level_loss=per_token)
    close(rollout(loss), rollout.mean(terms, per_token), (rollout.logp,))


def test_policy_loss_of_sequences():
    rollout = Rollout()
    drift = torch.where(rollout.mask, rollout.logp - rollout.old, 0.0).sum(1) / rollout.mask.sum(1)
    terms = rollout.clipped(drift.exp()[:, None], 0.01, 0.02)
    loss = openrlhf.policy_loss(0.01, 0.02, policy_loss_type="gspo")
    close(rollout(loss), rollout.mean(terms, False), (rollout.logp,))


@pytest.mark.parametrize("mode", ["mask", "clip"])
def test_correction_for_another_sampler(mode):
    rollout = Rollout()
    ratio = (rollout.old - rollout.rollout).exp()
    weight = ratio.clamp(0.8, 1.3) if mode == "clip" else torch.where((ratio >= 0.8) & (ratio <= 1.3), ratio, 0.0)
    wanted = rollout.mean(weight * rollout.clipped((rollout.logp - rollout.old).exp(), 0.2, 0.2), True)
    ours = advantages.rollout_importance_weight(
        rollout.old,
        rollout.rollout,
        rollout.mask,
        mode="token_truncate" if mode == "clip" else "token_mask",
        clip_min=0.8,
        clip_max=1.3,
    )
    close(rollout(openrlhf.policy_loss(), importance_weight=ours), wanted, (rollout.logp,))


def test_global_counts():
    """Of four ranks with 100 tokens: DDP's mean over ranks of these losses is that over all tokens."""
    rollout = Rollout()
    terms = rollout.clipped((rollout.logp - rollout.old).exp(), 0.2, 0.2)
    wanted = torch.where(rollout.mask, terms, 0.0).sum() / 100 * 4
    close(rollout(openrlhf.policy_loss(), num_items=100 / 4), wanted, (rollout.logp,))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_loss(smoothing):
    torch.manual_seed(0)
    logp = (-3 * torch.rand(4, S, dtype=torch.float64)).requires_grad_()
    reference = -10 * torch.rand(4, dtype=torch.float64)
    labels = torch.zeros(4, S, dtype=torch.long)
    ratio = logp.sum(1) - reference
    margin = 0.3 * (ratio[:2] - ratio[2:])
    wanted = (-logsigmoid(margin) * (1 - smoothing) - logsigmoid(-margin) * smoothing).mean()
    loss = openrlhf.dpo_loss(0.3, smoothing)
    close(stats_loss(Stats(logp=logp), labels, loss, ref_logp=reference).loss, wanted, (logp,))


def test_language_model_loss():
    torch.manual_seed(0)
    logits = torch.randn(B, S, V, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, V, (B, S))
    labels[:, :3] = -100
    wanted = cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100)
    loss = losses.create("sft")
    stats = token_stats(logits[:, :-1], labels[:, 1:], outputs=loss.statistics)
    close(stats_loss(stats, labels[:, 1:], loss).loss, wanted, (logits,))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: openrlhf.policy_loss(policy_loss_type="grpo"), "one of ppo, gspo: got 'grpo'"),
        (lambda: openrlhf.policy_loss(policy_loss_type="gspo", dual_clip=3.0), "gspo with a dual_clip"),
        (lambda: openrlhf.policy_loss(dual_clip=0.5), "dual_clip must lie"),
        (lambda: openrlhf.dpo_loss(0.1, ipo=True), "OpenRLHF sums"),
    ],
)
def test_what_is_not_here_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
