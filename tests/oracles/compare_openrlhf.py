"""Log-probs and losses against OpenRLHF's own code: ``python tests/oracles/compare_openrlhf.py FOLDER``.

FOLDER holds its ``models/utils.py`` and ``models/loss.py`` (``site-packages/openrlhf``, or an unpacked wheel). The two
files are loaded alone, since the package needs deepspeed, ray and vllm. It prints the largest relative difference of
each value and gradient in float64, and fails where one is above its bound.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fused_po import advantages, losses, stats_loss
from fused_po.stats import Stats
from fused_po.trainers import openrlhf as ours

B, S, V = 5, 30, 500
# OpenRLHF adds 1e-8 to counts
BOUND = 1e-7


def load(folder: Path) -> tuple[Any, Any]:
    """OpenRLHF's ``utils`` and ``loss``."""
    sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
    package = sys.modules["openrlhf_models"] = ModuleType("openrlhf_models")
    package.__path__ = [str(folder / "models")]
    found = []
    for name in ("utils", "loss"):
        spec = importlib.util.spec_from_file_location(f"openrlhf_models.{name}", folder / "models" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found[0], found[1]


def report(what: str, mine: Tensor, want: Tensor, leaf: Tensor) -> bool:
    """Values, and gradients of a sum with other weights for each of them."""
    upstream = torch.linspace(0.5, 1, want.numel(), dtype=want.dtype).view_as(want)
    pairs = [(mine, want)]
    pairs.append(tuple(torch.autograd.grad((one * upstream).sum(), leaf)[0] for one in (mine, want)))  # type: ignore[arg-type]
    worst = max(((one - other).norm() / other.norm()).item() for one, other in pairs)
    print(f"{what:60s} {worst:9.1e}  {'ok' if worst <= BOUND else 'ABOVE ' + str(BOUND)}")
    return worst <= BOUND


def main(folder: Path) -> bool:
    utils, loss = load(folder)
    torch.manual_seed(0)
    logits = (3 * torch.randn(B, S, V, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, V, (B, S))
    fine = True
    for temperature in (1.0, 0.7):
        want = utils.log_probs_from_logits(logits * 1.0, labels, temperature)
        mine = ours.log_probs_from_logits(logits, labels, temperature)
        fine &= report(f"log_probs_from_logits, temperature {temperature}", mine, want, logits)
    # its body, without torch.compile
    entropy = getattr(utils.compute_entropy, "__wrapped__", utils.compute_entropy)
    fine &= report("compute_entropy", ours.compute_entropy(logits), entropy(logits), logits)

    mask = torch.arange(S) < torch.tensor([S, 4, 17, 1, 22])[:, None]
    positions = torch.where(mask, 0, -100)
    logp = (-3 * torch.rand(B, S, dtype=torch.float64)).requires_grad_()
    old = logp.detach() + 0.3 * torch.randn(B, S, dtype=torch.float64)
    rollout = old + 0.3 * torch.randn(B, S, dtype=torch.float64)
    advantage = torch.randn(B, S, dtype=torch.float64)
    given: dict[str, Any] = {"old_logp": old, "advantage": advantage}
    for settings in (
        {},
        {"clip_eps_high": 0.28, "dual_clip": 1.3},
        {"token_level_loss": False},
        {"policy_loss_type": "gspo", "clip_eps_low": 0.01, "clip_eps_high": 0.02},
    ):
        for counts in ({}, {"dp_size": 4, "batch_num_tokens": 300.0, "global_batch_size": 22.0}):
            want = loss.PolicyLoss(**settings)(logp, old, advantage, mask, **counts)[0]
            share = {"num_items": 300 / 4, "num_sequences": 22 / 4} if counts else {}
            mine = stats_loss(Stats(logp=logp), positions, ours.policy_loss(**settings), **given, **share).loss
            fine &= report(f"PolicyLoss {settings}{', global counts' if counts else ''}", mine, want, logp)
    for mode, name in (("mask", "token_mask"), ("clip", "token_truncate")):
        correction = {"is_correction_level": "token", "is_correction_mode": mode, "is_correction_threshold": (0.8, 1.3)}
        want = loss.PolicyLoss(**correction)(logp, old, advantage, mask, rollout)[0]
        weight = advantages.rollout_importance_weight(old, rollout, mask, mode=name, clip_min=0.8, clip_max=1.3)
        mine = stats_loss(Stats(logp=logp), positions, ours.policy_loss(), **given, importance_weight=weight).loss
        fine &= report(f"PolicyLoss, {mode} by token ratio", mine, want, logp)

    pairs = (-3 * torch.rand(4, S, dtype=torch.float64)).requires_grad_()
    reference = -40 * torch.rand(4, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        want = loss.DPOLoss(0.1, smoothing)(*pairs.sum(1).chunk(2), *reference.chunk(2))[0]
        whole = torch.zeros(4, S, dtype=torch.long)
        mine = stats_loss(Stats(logp=pairs), whole, ours.dpo_loss(0.1, smoothing), ref_logp=reference).loss
        fine &= report(f"DPOLoss, label_smoothing {smoothing}", mine, want, pairs)

    values = torch.randn(B, S, dtype=torch.float64).requires_grad_()
    before, returns = torch.randn(2, B, S, dtype=torch.float64)
    want = loss.ValueLoss(0.2)(values, before, returns, mask)
    fine &= report("ValueLoss", losses.value_loss(values, returns, before, mask), want, values)
    return fine


if __name__ == "__main__":
    sys.exit(not main(Path(sys.argv[1])))
