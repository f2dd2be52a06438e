"""OpenRLHF's log-probs and losses (0.11) on ours: by its names and signatures, or from hidden states.

- ``log_probs_from_logits``, ``compute_entropy``: the same names; the logits are not overwritten
- ``Actor(sequences, action_mask, attention_mask)``: ``actor_log_probs(model, sequences, action_mask, ...)``
- ``PolicyLoss(clip_eps_low, clip_eps_high, dual_clip, ...)``: ``policy_loss(...)``, for ``linear_loss``
- ``DPOLoss(beta, label_smoothing)``: ``dpo_loss(...)``
- ``GPTLMLoss()``, ``SFTLoss()``: ``losses.create("sft")``, on labels that are shifted
- ``ValueLoss(clip_eps)``: ``losses.value_loss(..., cliprange_value=clip_eps)``
- ``is_correction_level="token"`` by ratio: ``advantages.rollout_importance_weight``, modes ``token_mask`` and
  ``token_truncate``

``batch_num_tokens / dp_size`` is our ``num_items``, ``global_batch_size / dp_size`` our ``num_sequences``. Nothing here
imports OpenRLHF.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_po import losses
from fused_po.losses import Loss
from fused_po.ops import linear_token_stats, token_stats
from fused_po.ops.checks import IGNORE
from fused_po.trainers.model import take_apart

__all__ = ["actor_log_probs", "compute_entropy", "dpo_loss", "log_probs_from_logits", "policy_loss"]

TYPES = ("ppo", "gspo")


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """``openrlhf.models.utils.log_probs_from_logits``: one read of the logits, one more for their gradient.

    Unlike there the logits are never overwritten (OpenRLHF divides them by the temperature in place), half-precision
    logits give float32, and a label of -100 gives 0.

    Args:
        logits: (..., V), floating point.
        labels: (...), int64, already shifted.
        temperature: of the logits; a number, or a tensor in the shape of labels.

    Returns:
        (...), float32 (float64 for float64), differentiable.
    """
    flat = temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature
    found = token_stats(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), temperature=flat).logp
    assert found is not None
    return found.reshape(labels.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    """``openrlhf.models.utils.compute_entropy``: in nats, without a softmax in memory.

    Args:
        logits: (..., V), floating point; they are not overwritten.

    Returns:
        (...), float32 (float64 for float64), differentiable.
    """
    # any label will do
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    found = token_stats(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), outputs=("entropy",)).entropy
    assert found is not None
    return found.reshape(labels.shape)


def actor_log_probs(
    model: nn.Module,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    backend: str | None = None,
    scratch_bytes: int | None = None,
    **mm_inputs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """What OpenRLHF's ``Actor.forward`` returns as log-probs, without logits: differentiable, for any loss on top.

    With an ``action_mask`` only actions enter the head. Positions follow the attention mask, as there; with images the
    model finds its own. The auxiliary loss of a mixture of experts is not returned.

    Args:
        model: a causal LM from transformers in whatever wraps it (``actor.model``), see ``take_apart``.
        sequences: (B, S) int64, prompts and actions.
        action_mask: (B, A), A < S, 0 where one of the last A tokens is no action; None: all tokens but the first.
        attention_mask: (B, S), or None.
        temperature: of the logits; a number, (B,) or (B, S).
        return_entropy: True also returns the entropy, of the same positions.
        backend, scratch_bytes: as in ``linear_token_stats``.
        mm_inputs: what else the model takes, images for one.

    Returns:
        Log-probs (B, A), or (B, S - 1) without an ``action_mask``; 0 where it is 0. With ``return_entropy`` a pair.

    Raises:
        ValueError: an ``action_mask`` that is not (B, A) with A < S, or as ``take_apart``.
    """
    count, length = sequences.shape
    width = length - 1 if action_mask is None else action_mask.shape[-1]
    if action_mask is not None and (action_mask.shape != (count, width) or width >= length):
        raise ValueError(f"action_mask must be ({count}, A) with A < {length}: got {tuple(action_mask.shape)}")
    given: dict[str, Any] = {"input_ids": sequences, "attention_mask": attention_mask, **mm_inputs}
    if attention_mask is not None and not mm_inputs:
        positions = attention_mask.long().cumsum(-1) - 1
        given["position_ids"] = positions.masked_fill(attention_mask == 0, 1)
    actions = sequences[:, length - width :]
    if action_mask is not None:
        actions = actions.masked_fill(action_mask == 0, IGNORE)
    # the position before each action; the last one has none
    labels = nn.functional.pad(actions, (length - 1 - width, 1), value=IGNORE)
    hidden, head, _ = take_apart(model, **{name: value for name, value in given.items() if value is not None})
    found = linear_token_stats(
        hidden,
        head.weight,
        labels,
        outputs=("logp", "entropy") if return_entropy else ("logp",),
        temperature=temperature,
        backend=backend,
        scratch_bytes=scratch_bytes,
        **head.options,
    )
    assert found.logp is not None
    logp = found.logp[:, length - 1 - width : -1]
    if not return_entropy:
        return logp
    assert found.entropy is not None
    return logp, found.entropy[:, length - 1 - width : -1]


def policy_loss(
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    policy_loss_type: str = "ppo",
) -> Loss:
    """The loss that OpenRLHF's ``PolicyLoss`` of these arguments is.

    Side inputs: ``advantage`` and ``old_logp`` per token. Log-ratios are clamped to +-80 (OpenRLHF: +-20). A mean over
    sequences counts empty ones unless ``num_sequences`` says otherwise.

    Args:
        clip_eps_low, clip_eps_high, dual_clip: the clip range, and a bound on the ratio where the advantage is
            negative.
        token_level_loss: the mean over tokens; False: over sequences of their means. Not read with ``gspo``.
        policy_loss_type: ``ppo``, or ``gspo``: one ratio per sequence, mean over sequences.

    Raises:
        ValueError: another type, ``gspo`` with a ``dual_clip``, or a number out of range.
    """
    if policy_loss_type not in TYPES:
        raise ValueError(f"policy_loss_type must be one of {', '.join(TYPES)}: got {policy_loss_type!r}")
    clip: dict[str, Any] = {"epsilon": clip_eps_low, "epsilon_high": clip_eps_high}
    if policy_loss_type == "gspo":
        if dual_clip is not None:
            raise ValueError("gspo with a dual_clip is not here")
        return losses.create("gspo", **clip)
    mode = "token-mean" if token_level_loss else "seq-mean-token-mean"
    return losses.create("ppo", dual_clip=dual_clip, loss_agg_mode=mode, **clip)


def dpo_loss(beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> Loss:
    """The loss that OpenRLHF's ``DPOLoss`` of these arguments is; side input ``ref_logp``, first half chosen.

    Args:
        beta, label_smoothing: its own; with a smoothing it is ``conservative``, without ``sigmoid``.
        ipo: False; True is refused: OpenRLHF takes sums of log-probs there, our ``ipo`` their means, as TRL does.

    Raises:
        ValueError: ``ipo=True``, or a number out of range.
    """
    if ipo:
        raise ValueError("ipo=True is not here: losses.create('ipo') takes means over tokens, OpenRLHF sums")
    if label_smoothing == 0.0:
        return losses.create("sigmoid", beta=beta)
    return losses.create("conservative", beta=beta, label_smoothing=label_smoothing)
