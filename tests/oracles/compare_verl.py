"""Log-probs and policy losses against an installed verl: ``python tests/oracles/compare_verl.py`` from the repository.

A script and not a test, since verl's dependencies (ray, a certain tensordict, ...) fit into no environment of ours. It
prints the largest relative difference of each value and gradient, and fails where one is above its bound.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fused_po.trainers import verl as ours

B, S, H, V = 6, 40, 64, 1000
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
NAMES = ("vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo")
INFOS: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 4, "batch_num_tokens": 700, "global_batch_size": 30, "loss_scale_factor": 50},
)
# verl adds 1e-8 to counts and 1e-10 to weights
BOUND = 1e-7


def apart(mine: Tensor, want: Tensor) -> float:
    """The relative difference, in the 2-norm."""
    return ((mine.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300)).item()


def report(what: str, value: float, bound: float) -> bool:
    print(f"{what:60s} {value:9.1e}  {'ok' if value <= bound else 'ABOVE ' + str(bound)}")
    return value <= bound


def policy_losses() -> bool:
    """Value and gradient of every loss that has verl's name, in float64, under every way of averaging."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
    from verl.workers.config import ActorConfig

    ours.register_policy_losses()
    assert all(f"fused_po_{name}" in POLICY_LOSS_REGISTRY for name in ours.POLICY_LOSSES)
    torch.manual_seed(0)
    lengths = torch.tensor([S, 13, 0, 1, 27, 33])
    mask = torch.arange(S) < lengths[:, None]
    logp = -3 * torch.rand(B, S, dtype=torch.float64)
    old = logp + 0.3 * torch.randn(B, S, dtype=torch.float64)
    advantages, weights = torch.randn(B, S, dtype=torch.float64), torch.rand(B, S, dtype=torch.float64) + 0.5
    fine = True
    for name in NAMES:
        worst, metric = 0.0, 0.0
        for mode in MODES:
            for info in INFOS:
                for weight in (None, weights):
                    config = ActorConfig(
                        strategy="fsdp",
                        rollout_n=1,
                        ppo_micro_batch_size_per_gpu=1,
                        clip_ratio_low=0.1,
                        clip_ratio_high=0.15,
                        clip_ratio_c=1.3,
                        tau_pos=0.8,
                        tau_neg=1.4,
                    )
                    # every candidate is dropped, so that chance has no part in it
                    object.__setattr__(config.policy_loss, "clip_cov_ratio", 1.0)
                    object.__setattr__(config.policy_loss, "clip_cov_lb", -0.5)
                    object.__setattr__(config.policy_loss, "kl_cov_ratio", 0.1)
                    config.global_batch_info.update(info)
                    found = []
                    for registered in (name, f"fused_po_{name}"):
                        leaf = logp.clone().requires_grad_()
                        loss, metrics = get_policy_loss_fn(registered)(
                            old_log_prob=old,
                            log_prob=leaf,
                            advantages=advantages,
                            response_mask=mask,
                            loss_agg_mode=mode,
                            config=config,
                            rollout_is_weights=weight,
                        )
                        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics))
                    (want, gradient, theirs), (value, mine, metrics) = found
                    worst = max(worst, apart(value, want), apart(mine, gradient))
                    if name in ("vanilla", "gspo"):
                        metric = max([metric, *(abs(metrics[key] - theirs[key]) for key in theirs)])
        fine &= report(f"{name}: loss and gradient", worst, BOUND)
        if name in ("vanilla", "gspo"):
            fine &= report(f"{name}: metrics", metric, BOUND)
    return fine


def actor_step() -> bool:
    """verl's ``ppo_loss`` on a packed batch, entropy and KL terms added: from its head and loss, then from ours."""
    from tensordict import TensorDict
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig
    from verl.workers.utils.losses import ppo_loss

    torch.manual_seed(3)
    prompts, responses = torch.tensor([3, 5, 2, 4]), torch.tensor([7, 1, 9, 4])
    longest, total = int(responses.max()), int((prompts + responses).sum())
    hidden, weight = torch.randn(total, H), torch.randn(V, H) * 3 / H**0.5
    labels = torch.randint(0, V, (total,))
    given = {name: torch.randn(4, longest) * 0.3 for name in ("advantages", "old_log_probs", "ref_log_prob")}
    mask = torch.arange(longest) < responses[:, None]
    attention = torch.cat([torch.arange(int(prompts.max())) < prompts[:, None], mask], 1).long()
    found = []
    for head, name in ((FusedLinearForPPO(), "vanilla"), (ours.FusedLinearForPPO(), "fused_po_vanilla")):
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_high=0.28,
            entropy_coeff=0.01,
            use_kl_loss=True,
            kl_loss_coef=0.1,
        )
        object.__setattr__(config.policy_loss, "loss_mode", name)
        leaves = [one.clone().requires_grad_() for one in (hidden, weight)]
        logp, entropy = head(*leaves, labels, 0.9)
        data = TensorDict(
            {
                "prompts": torch.zeros(4, int(prompts.max()), dtype=torch.long),
                "responses": torch.zeros(4, longest, dtype=torch.long),
                "attention_mask": attention,
                "response_mask": mask,
                **given,
                "old_log_probs": given["old_log_probs"] - 6.0,
                "ref_log_prob": given["ref_log_prob"] - 6.0,
            },
            batch_size=4,
        )
        for key, value in (("dp_size", 2), ("batch_num_tokens", 50), ("global_batch_size", 9)):
            data.set_non_tensor(key, value)
        loss, metrics = ppo_loss(config, {"log_probs": logp, "entropy": entropy}, data)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves), set(metrics)))
    fine = found[0][-1] == found[1][-1]
    for name, want, mine in zip(("loss", "dH", "dW"), *(one[:3] for one in found), strict=True):
        fine &= report(f"ppo_loss of a packed batch: {name}", apart(mine, want), 2e-6)
    return fine


def log_probs(dtype: torch.dtype, temperature: float) -> bool:
    """verl's torch backend and ours, both against float64: ours may be twice as far off at most."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    torch.manual_seed(1)
    hidden = torch.randn(B, S, H).to(dtype)
    weight = (torch.randn(V, H) * 3 / H**0.5).to(dtype)
    labels = torch.randint(0, V, (B, S))
    upstream = torch.randn(2, B, S)
    results = []
    for module, kind in (
        (ours.FusedLinearForPPO(), torch.float64),
        (ours.FusedLinearForPPO(), dtype),
        (FusedLinearForPPO(), dtype),
    ):
        leaves = [one.detach().to(kind).requires_grad_() for one in (hidden, weight)]
        logp, entropy = module(*leaves, labels, temperature)
        total = (logp * upstream[0]).sum() + 0.1 * (entropy.to(logp.dtype) * upstream[1]).sum()
        results.append((logp.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)))
    fine = True
    for what, truth, mine, theirs in zip(("log-probs", "entropy", "dH", "dW"), *results, strict=True):
        name = f"{what}, {str(dtype).removeprefix('torch.')}, temperature {temperature}"
        print(f"{name:60s} verl {apart(theirs, truth):9.1e}")
        fine &= report(f"{name} fused_po", apart(mine, truth), 2 * apart(theirs, truth) + torch.finfo(dtype).eps)
    return fine


def enabled() -> bool:
    """A model under verl's own patch, before and after ``enable``."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    class Patched(LlamaForCausalLM):
        pass

    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": H, "intermediate_size": 64, "num_hidden_layers": 1}
    model = Patched(LlamaConfig(vocab_size=V, num_attention_heads=2, num_key_value_heads=2, **sizes))
    ids = torch.randint(0, V, (1, S))
    given: dict[str, Any] = {"input_ids": ids, "temperature": 0.7, "return_dict": True}
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    want = model(**given)
    with ours.enable():
        kept = model(**given)
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
        again = model(**given)
        answered = SimpleNamespace(calls=ours.calls())
    fine = answered.calls == 2
    for name, found in (("patched before enable()", kept), ("patched after enable()", again)):
        fine &= report(f"{name}: log-probs", apart(found.log_probs, want.log_probs), 1e-6)
        fine &= report(f"{name}: entropy", apart(found.entropy, want.entropy), 1e-6)
    return fine


if __name__ == "__main__":
    settings = [(dtype, temperature) for dtype in (torch.float32, torch.bfloat16) for temperature in (1.0, 0.7)]
    sys.exit(not all([policy_losses(), actor_step(), *(log_probs(*one) for one in settings), enabled()]))
