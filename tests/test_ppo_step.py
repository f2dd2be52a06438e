"""A PPO step with a value head on the policy's backbone, as docs/guides/ppo.md takes it, against autograd."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po import advantages, linear_loss, losses
from fused_po.trainers.model import hidden_and_head, token_stats_of

B, S, V = 4, 9, 37


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Backwards over one answer, from the equation."""
    found, carried, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        carried = reward + gamma * following - value + gamma * lam * carried
        found.append(carried)
        following = value
    return found[::-1]


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_every_gradient_is_that_of_autograd(kl_in_loss: bool) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, **sizes)).double()
    value_head = torch.nn.Linear(16, 1).double()
    parameters = [*policy.parameters(), *value_head.parameters()]
    ids = torch.randint(3, V, (B, S + 1))
    labels = ids[:, 1:].clone()
    labels[:, :3] = -100
    for row, length in enumerate((9, 4, 6, 8)):
        labels[row, length:] = -100
    mask = labels != -100
    inputs = {"input_ids": ids}
    backbone, head = hidden_and_head(policy)
    with torch.no_grad():
        now = token_stats_of(policy, inputs, labels).logp
        old_values = value_head(backbone(**inputs)[:, :-1])[..., 0]
    old_logp, ref_logp = (now + 0.3 * torch.randn(B, S, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(B, S, dtype=torch.float64) - 0.05 * (old_logp - ref_logp)
    advantage, returns = advantages.gae(rewards, old_values, mask, gamma=0.9, lam=0.8)
    for row in range(B):
        wanted = gae(rewards[row][mask[row]].tolist(), old_values[row][mask[row]].tolist(), 0.9, 0.8)
        torch.testing.assert_close(advantage[row][mask[row]], torch.tensor(wanted, dtype=torch.float64))
    # so far that the clip of the value loss acts
    old_values = old_values + 0.4 * torch.randn(B, S, dtype=torch.float64)

    settings = {"epsilon": 0.1, "epsilon_high": 0.15, "dual_clip": 1.2, "entropy_coef": 0.02}
    given = {"advantage": advantage, "old_logp": old_logp}
    if kl_in_loss:
        settings["beta"], given["ref_logp"] = 0.05, ref_logp
    hidden = backbone(**inputs)[:, :-1]
    out = linear_loss(hidden, head.weight, labels, losses.create("ppo", **settings), **given, **head.options)
    value = losses.value_loss(value_head(hidden)[..., 0], returns, old_values, mask, cliprange_value=0.2)
    found = torch.autograd.grad(out.loss + 0.1 * value, parameters)

    output = policy(ids, output_hidden_states=True)
    everything = output.logits[:, :-1].log_softmax(-1)
    logp = everything.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    ratio = (logp - old_logp).exp()
    terms = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage)
    terms = torch.where(advantage < 0, torch.minimum(terms, -1.2 * advantage), terms)
    terms = terms + 0.02 * (everything.exp() * everything).sum(-1)
    if kl_in_loss:
        terms = terms + 0.05 * ((ref_logp - logp).exp() - (ref_logp - logp) - 1)
    values = value_head(output.hidden_states[-1][:, :-1])[..., 0]
    near = torch.minimum(torch.maximum(values, old_values - 0.2), old_values + 0.2)
    errors = torch.maximum((values - returns).square(), (near - returns).square())
    assert (errors != (values - returns).square())[mask].any()
    policy_loss, squares = (torch.where(mask, one, 0.0).sum() / mask.sum() for one in (terms, errors))
    torch.testing.assert_close(out.loss, policy_loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(value, 0.5 * squares, rtol=1e-11, atol=1e-12)
    wanted = torch.autograd.grad(policy_loss + 0.05 * squares, parameters)
    assert all(gradient.abs().max() > 0 for gradient in found)
    for mine, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-8, atol=1e-11)
