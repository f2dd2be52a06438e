"""What a policy loss reads of a rollout: advantages from rewards, and importance weights of the sampler.

Functions of tokens take a padded batch, (B, S), or a packed one, (N,) with ``cu_seqlens``, and give both the same
numbers, bit for bit. Tokens where ``mask`` is False are never read: they are skipped as if they were not there, and
hold 0 in what is returned. Everything is computed in float64, without gradient; the host waits once per call.

Statistics are those of the batch at hand: with several ranks, gather rewards first.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fused_po.segments import Segments

__all__ = ["gae", "group_relative", "leave_one_out", "reinforce_plus_plus", "rollout_importance_weight", "whiten"]

SCALES = ("group", "batch", "none")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# of verl's masked_whiten
WHITEN_EPS = 1e-8
# a weight of at most e^80 is finite in float32 with room for a product
MAX_LOG_WEIGHT = 80.0
# stands for infinity, so that a sum over tokens is never inf - inf
HUGE = 1e30
KINDS = {
    "a floating point": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "an integer": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "a bool": (torch.bool,),
}


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), per token:

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = sum_l (gamma lam)^l delta_{t+l},    return_t = A_t + V_t

    t counts the loss tokens of a sequence; the value after the last one is 0. As in verl's
    ``compute_gae_advantage_return`` the next value and the running advantage pass unchanged over tokens without loss,
    and a reward that stands at one is lost. Unlike there, advantages are not whitened: see ``whiten``.

    Args:
        rewards: (B, S), or packed (N,); floating point, or whole numbers, which make the result float32.
        values: the critic's, in the shape of ``rewards``; floating point.
        mask: bool in the shape of ``rewards``, True where a token carries loss; None where all do.
        cu_seqlens: (B + 1,) int, cumulative lengths of packed sequences; packed without it is one sequence.
        gamma: 1.0, discount in [0, 1].
        lam: 0.95, in [0, 1]; 0 is the one-step error, 1 the discounted return less the value.

    Returns:
        Advantages and returns, both in the shape and dtype of ``rewards``, 0 where ``mask`` is False.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ``gamma`` or ``lam`` outside [0, 1].
    """
    _check_unit(gamma=gamma, lam=lam)
    rewards = _fractional(rewards)
    tokens = _loss_tokens(mask, cu_seqlens, rewards=rewards, values=values)
    value = tokens.take(values)
    delta = tokens.take(rewards) + gamma * tokens.following(value) - value
    advantage = tokens.discounted(delta, gamma * lam)
    return tokens.put(advantage, rewards.dtype), tokens.put(advantage + value, rewards.dtype)


def group_relative(
    rewards: Tensor,
    *,
    num_generations: int | None = None,
    groups: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """GRPO's advantage (Shao et al., arXiv 2402.03300, section 4.1.2): ``(r - mean of its group) / (std + eps)``.

    The numbers of TRL 1.16's ``GRPOTrainer``: a NaN reward (a completion that could not be scored) gets 0 and counts in
    no mean and no std; a group with one reward gets 0.

    Args:
        rewards: (B,), one per sequence, floating point, or whole numbers, which make the result float32.
        num_generations: sequences per group, where groups are consecutive blocks.
        groups: (B,) int, the group of each sequence, in any order and of any sizes; on the device of ``rewards``.
        scale: ``"group"``, the unbiased std of the group; ``"batch"``, that of all rewards (arXiv 2508.08221);
            ``"none"``, no division (Dr. GRPO, Liu et al., arXiv 2503.20783).
        eps: 1e-4 as in TRL (verl: 1e-6), positive.

    Returns:
        (B,) in the dtype of ``rewards``.

    Raises:
        ValueError: both or neither of ``num_generations`` and ``groups``, B not a multiple of ``num_generations``, an
            unknown ``scale``, or shapes, dtypes or devices that do not fit.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: expected one of {', '.join(SCALES)}")
    _check_eps(eps)
    rewards = _fractional(rewards)
    members = _groups(rewards, num_generations, groups)
    reward = members.centred(members.take(rewards))
    count, total, std = members.moments(reward)
    if scale == "batch":
        everyone = replace(members, lengths=members.lengths.sum(0, keepdim=True))
        std = everyone.moments(everyone.centred(members.take(rewards)))[2]
    advantage = reward - total / count
    if scale != "none":
        advantage = advantage / (std + eps)
    return members.put(advantage, rewards.dtype).nan_to_num(nan=0.0)


def leave_one_out(rewards: Tensor, *, num_generations: int | None = None, groups: Tensor | None = None) -> Tensor:
    """RLOO's advantage (Ahmadian et al., arXiv 2402.14740): the reward less the mean of the others in its group.

    The numbers of TRL 1.16's ``RLOOTrainer``: a NaN reward gets 0 and is none of the others. A reward without others
    gets 0, as there and in verl's ``rloo_vectorized``; verl's ``rloo`` keeps the reward itself.

    Args:
        rewards: (B,), one per sequence, floating point, or whole numbers, which make the result float32.
        num_generations: sequences per group, where groups are consecutive blocks.
        groups: (B,) int, the group of each sequence, in any order and of any sizes; on the device of ``rewards``.

    Returns:
        (B,) in the dtype of ``rewards``.

    Raises:
        ValueError: both or neither of ``num_generations`` and ``groups``, B not a multiple of ``num_generations``, or
            shapes, dtypes or devices that do not fit.
    """
    rewards = _fractional(rewards)
    members = _groups(rewards, num_generations, groups)
    reward = members.centred(members.take(rewards))
    count, total, _ = members.moments(reward)
    # 0 / 0 where there are no others
    advantage = reward - (total - reward) / (count - 1.0)
    return members.put(advantage, rewards.dtype).nan_to_num(nan=0.0)


def reinforce_plus_plus(
    rewards: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """REINFORCE++ (Hu et al., arXiv 2501.03262): ``sum_l gamma^l r_{t+l}`` per token, whitened over the batch.

    t counts the loss tokens of a sequence, as in verl's ``compute_reinforce_plus_plus_outcome_advantage``; a reward at
    a token without loss is lost. The paper's KL penalty is a part of the rewards, for the caller to subtract. Means are
    over the number of loss tokens, to which verl adds 1e-8.

    Args:
        rewards: (B, S), or packed (N,); floating point, or whole numbers, which make the result float32.
        mask: bool in the shape of ``rewards``, True where a token carries loss; None where all do.
        cu_seqlens: (B + 1,) int, cumulative lengths of packed sequences; packed without it is one sequence.
        gamma: 1.0, discount in [0, 1].

    Returns:
        In the shape and dtype of ``rewards``, 0 where ``mask`` is False.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ``gamma`` outside [0, 1].
    """
    _check_unit(gamma=gamma)
    rewards = _fractional(rewards)
    tokens = _loss_tokens(mask, cu_seqlens, rewards=rewards)
    returns = tokens.discounted(tokens.take(rewards), gamma)
    return tokens.put(_whitened(returns, True, WHITEN_EPS), rewards.dtype)


def whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = WHITEN_EPS) -> Tensor:
    """``(v - mean) / sqrt(var + eps)`` over the loss tokens of the batch, with the unbiased variance.

    Equal values become 0; without any the result is all 0.

    Args:
        values: (B, S) or (N,), floating point.
        mask: bool in the shape of ``values``, True where a token carries loss; None where all do.
        shift_mean: True; False adds the mean again, so that a single value is kept.
        eps: 1e-8 as in verl's ``masked_whiten``, positive.

    Returns:
        In the shape and dtype of ``values``, 0 where ``mask`` is False.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ``eps`` not positive.
    """
    _check_eps(eps)
    tokens = _loss_tokens(mask, None, values=values)
    return tokens.put(_whitened(tokens.take(values), shift_mean, eps), values.dtype)


def rollout_importance_weight(
    old_logp: Tensor,
    sampling_logp: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """The weight ``w = pi_old / pi_sampling`` for samples drawn by another engine than the one that trains, to pass as
    ``importance_weight``: TRL 1.16's ``vllm_importance_sampling_mode`` (Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", 2025).

    ``token_*`` takes w per token, ``sequence_*`` the product over a sequence's loss tokens. ``*_truncate`` clamps it to
    [clip_min, clip_max], ``*_mask`` makes it 0 outside. A token where a log-prob is NaN, or where both are the same
    infinity, counts as one without difference. Never NaN, never infinite: what no bound holds ends at e^80, or at the
    largest number of the dtype.

    Args:
        old_logp: log-probs under the model that is trained, before the update: (B, S), or packed (N,); floating point.
        sampling_logp: those that the sampler returned, in the shape of ``old_logp``; floating point.
        mask: bool in the shape of ``old_logp``, True where a token carries loss; None where all do. Tokens that the
            sampler did not draw (those of a tool) must be False.
        cu_seqlens: (B + 1,) int, cumulative lengths of packed sequences; packed without it is one sequence.
        mode: ``"token_truncate"``, ``"token_mask"``, ``"sequence_truncate"`` or ``"sequence_mask"``.
        clip_max: 3.0; None: no upper bound.
        clip_min: None: no lower bound.

    Returns:
        In the dtype of ``old_logp``. Token modes: its shape, 0 where ``mask`` is False (TRL: 1, which its loss then
        masks). Sequence modes: (B,), and a sequence without loss tokens has w = 1 before it is bounded.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown mode, a truncating mode without any bound,
            bounds that are negative or NaN, ``clip_min`` not below ``clip_max``.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    level, _, action = mode.partition("_")
    _check_clip(mode, clip_max, clip_min)
    tokens = _loss_tokens(mask, cu_seqlens, old_logp=old_logp, sampling_logp=sampling_logp)
    difference = tokens.take(old_logp) - tokens.take(sampling_logp)
    difference = difference.nan_to_num(nan=0.0, posinf=HUGE, neginf=-HUGE)
    if level == "sequence":
        difference = tokens.sum(difference)
    weight = difference.exp()
    low, high = 0.0 if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    if action == "truncate":
        weight = weight.clamp(low, high)
    else:
        weight = torch.where((weight >= low) & (weight <= high), weight, 0.0)
    dtype = old_logp.dtype
    weight = weight.clamp_max(min(math.exp(MAX_LOG_WEIGHT), torch.finfo(dtype).max))
    return weight.to(dtype) if level == "sequence" else tokens.put(weight, dtype)


def _loss_tokens(mask: Tensor | None, cu_seqlens: Tensor | None, **inputs: Tensor) -> Segments:
    """The loss tokens of sequences; ``inputs`` by name must agree in shape and device, the first one says which."""
    name, first = next(iter(inputs.items()))
    for other, tensor in inputs.items():
        _check_kind(other, tensor, "a floating point")
        _check_like(name, first, other, tensor)
    shape, device, count = first.shape, first.device, first.numel()
    if first.ndim not in (1, 2):
        raise ValueError(f"{name} must be (B, S), or packed (N,) with cu_seqlens: got {tuple(shape)}")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    _check_kind("mask", mask, "a bool")
    _check_like(name, first, "mask", mask)
    if cu_seqlens is None:
        sequences, width = shape if first.ndim == 2 else (1, count)
        bounds = torch.arange(sequences + 1, device=device) * width
    else:
        _check_kind("cu_seqlens", cu_seqlens, "an integer")
        if first.ndim != 1 or cu_seqlens.ndim != 1:
            got = f"got {tuple(cu_seqlens.shape)} and {tuple(shape)}"
            raise ValueError(f"cu_seqlens must be (B + 1,), with {name} packed (N,): {got}")
        bounds = cu_seqlens.detach().to(device, torch.int64)
    before = torch.cat([bounds.new_zeros(1), mask.reshape(-1).cumsum(0)])  # (N + 1,) loss tokens before a position
    # one transfer, so that the host waits once
    *ends, total = torch.cat([bounds, before[-1:]]).tolist()
    rises = [end - start for start, end in pairwise(ends)]
    if not ends or ends[0] != 0 or ends[-1] != count or min(rises, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {count}, the number of tokens: got {ends[:8]}")
    index = torch.searchsorted(before, torch.arange(1, total + 1, device=device)) - 1
    return Segments(shape, index, before[bounds].diff(), max(rises, default=0))


def _groups(rewards: Tensor, num_generations: int | None, groups: Tensor | None) -> Segments:
    _check_kind("rewards", rewards, "a floating point")
    if rewards.ndim != 1:
        raise ValueError(f"rewards must be (B,), one per sequence: got {tuple(rewards.shape)}")
    count = rewards.shape[0]
    if groups is not None and num_generations is None:
        _check_kind("groups", groups, "an integer")
        _check_like("rewards", rewards, "groups", groups)
        order = groups.argsort(stable=True)
        lengths = groups[order].unique_consecutive(return_counts=True)[1]
    elif num_generations is not None and groups is None:
        if num_generations < 1 or count % num_generations:
            raise ValueError(f"num_generations must divide the {count} rewards: got {num_generations}")
        order = torch.arange(count, device=rewards.device)
        lengths = order.new_full((count // num_generations,), num_generations)
    else:
        got = "neither" if groups is None else "both"
        raise ValueError(f"give either num_generations or groups: got {got}")
    return Segments(rewards.shape, order, lengths, count)


def _whitened(values: Tensor, shift_mean: bool, eps: float) -> Tensor:
    count = values.shape[0]
    # the first value as the origin: equal values have no mean to round
    origin = values[:1]
    values = values - origin
    mean = values.sum() / max(count, 1)
    centred = values - mean
    variance = centred.square().sum() / max(count - 1, 1)
    scaled = centred * (variance + eps).rsqrt()
    return scaled if shift_mean else scaled + mean + origin


def _fractional(rewards: Tensor) -> Tensor:
    """Whole numbers and flags as float32."""
    whole = isinstance(rewards, Tensor) and not rewards.is_floating_point() and not rewards.is_complex()
    return rewards.float() if whole else rewards


def _check_kind(name: str, values: Tensor, kind: str) -> None:
    got = values.dtype if isinstance(values, Tensor) else type(values).__name__
    if got not in KINDS[kind]:
        raise ValueError(f"{name} must be {kind} tensor: got {got}")


def _check_like(name: str, first: Tensor, other: str, tensor: Tensor) -> None:
    if tensor.shape != first.shape or tensor.device != first.device:
        wanted = f"the shape and device of {name}, {tuple(first.shape)} on {first.device}"
        raise ValueError(f"{other} must have {wanted}: got {tuple(tensor.shape)} on {tensor.device}")


def _check_unit(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1]: got {number}")


def _check_eps(eps: float) -> None:
    if not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be positive: got {eps}")


def _check_clip(mode: str, clip_max: float | None, clip_min: float | None) -> None:
    for name, bound in (("clip_max", clip_max), ("clip_min", clip_min)):
        if bound is not None and not bound >= 0.0:
            raise ValueError(f"{name} must not be negative: got {bound}")
    if clip_min is not None and clip_max is not None and clip_min >= clip_max:
        raise ValueError(f"clip_min must be below clip_max: got {clip_min} and {clip_max}")
    if clip_min is None and clip_max is None and mode.endswith("truncate"):
        raise ValueError(f"mode {mode} needs clip_max or clip_min: got neither")
