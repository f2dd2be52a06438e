"""fused_po's policy losses for verl's registry: on ``stats_loss``, normalised by ``loss_agg_mode``, with any split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fused_po import losses
from fused_po.losses.policy import Aggregated, PolicyLoss
from fused_po.ops import stats_loss
from fused_po.ops.checks import IGNORE
from fused_po.splits import Split
from fused_po.stats import Stats

__all__ = ["POLICY_LOSSES", "policy_loss", "register_policy_losses"]

REGISTRY = "verl.trainer.ppo.core_algos"
# what verl adds to the policy loss itself, and what its losses are not given
NOT_GIVEN = {
    "ref_logp": "beta",
    "entropy": "entropy_coef or top_entropy_quantile",
    "sampling_logp": "an off-policy mask",
}
# verl's modes in the words of our losses; token-sum is token-mean over one token
MODES = {
    "token-mean": "token-mean",
    "token-sum": "token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
    "seq-mean-token-mean": "seq-mean-token-mean",
}
CLIP = {"epsilon": "clip_ratio_low", "epsilon_high": "clip_ratio_high"}

Number = int | float | Tensor


@dataclass(frozen=True)
class Entry:
    """How a policy loss of verl's registry is made.

    Attributes:
        loss: its name in ``fused_po.losses``.
        settings: hyper-parameters, each with the name of the actor's setting that it is read from; dots go deeper.
        fixed: further hyper-parameters.
        mode: the only ``loss_agg_mode`` that it has; None: any.
        refuses: whether another mode than ``mode`` in the configuration is refused, or, as by verl, not read.
    """

    loss: str
    settings: Mapping[str, str]
    fixed: Mapping[str, Any]
    mode: str | None = None
    refuses: bool = False


def _entry(loss: str, settings: Mapping[str, str] = CLIP, mode: str | None = None, **fixed: Any) -> Entry:
    return Entry(loss, settings, fixed, mode)


def _grpo(loss: str, mode: str, **fixed: Any) -> Entry:
    """A loss that differs from PPO by how it averages."""
    return Entry(loss, CLIP, fixed, mode, refuses=True)


_COV = {"clip_cov_ratio": "policy_loss.clip_cov_ratio", "clip_cov_lb": "policy_loss.clip_cov_lb"}
_TAU = {"sapo_temperature_pos": "tau_pos", "sapo_temperature_neg": "tau_neg"}

POLICY_LOSSES: Mapping[str, Entry] = {
    # by verl's names, what verl computes
    "vanilla": _entry("ppo", CLIP | {"dual_clip": "clip_ratio_c"}),
    "gspo": _entry("gspo_token"),
    "sapo": _entry("sapo", _TAU, "seq-mean-token-mean"),
    "gpg": _entry("gpg", {}),
    "clip_cov": _entry("clip_cov", CLIP | _COV | {"clip_cov_ub": "policy_loss.clip_cov_ub"}),
    "kl_cov": _entry("kl_cov", {"kl_cov_ratio": "policy_loss.kl_cov_ratio", "ppo_kl_coef": "policy_loss.ppo_kl_coef"}),
    "geo_mean": _entry("gmpo", CLIP, "seq-mean-token-mean"),
    "cispo": _entry("cispo_verl"),
    # by ours
    "ppo": _entry("ppo"),
    "reinforce_plus_plus": _entry("reinforce_plus_plus"),
    "grpo": _grpo("grpo", "seq-mean-token-mean"),
    "dapo": _grpo("dapo", "token-mean"),
    "dr_grpo": _grpo("grpo", "seq-mean-token-sum-norm"),
    "luspo": _grpo("luspo", "seq-mean-token-sum", importance_sampling_level="sequence"),
    "gmpo": _entry("gmpo", CLIP, "seq-mean-token-mean"),
    "vespo": _entry("vespo", {}),
    "aspo": _entry("aspo", CLIP | {"dual_clip": "clip_ratio_c"}),
    "topr": _entry("topr", {}),
    "asymre": _entry("asymre", {}),
    "w_reinforce": _entry("w_reinforce", {}),
    "psr": _entry("psr", {}),
    "nsr": _entry("nsr", {}),
}


@dataclass(frozen=True)
class PolicyLossFunction:
    """A policy loss with the signature of verl's registry, see ``policy_loss``.

    Attributes:
        name: of ``POLICY_LOSSES``.
        split, hyperparameters: as in ``policy_loss``.
    """

    name: str
    split: Split | Callable[[], Split] | None
    hyperparameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.name not in POLICY_LOSSES:
            raise ValueError(f"unknown policy loss {self.name!r}: expected one of {', '.join(POLICY_LOSSES)}")
        needs = self.loss("token-mean", None).needs
        for needed, because in NOT_GIVEN.items():
            if needed in needs:
                raise ValueError(
                    f"verl gives its policy losses no {needed}, which {because} needs: use the actor's settings"
                )

    @property
    def entry(self) -> Entry:
        """How the loss is made."""
        return POLICY_LOSSES[self.name]

    def loss(self, mode: str, config: Any) -> PolicyLoss:
        """The loss that averages by a mode of verl, under the actor's configuration or none."""
        entry = self.entry
        read = {key: _setting(config, where) for key, where in entry.settings.items()}
        if CLIP.keys() <= read.keys():
            read |= {key: _setting(config, "clip_ratio") for key in CLIP if read[key] is None}
        given = {key: value for key, value in read.items() if value is not None}
        loss: Any = losses.create(entry.loss, **{**given, **entry.fixed, **self.hyperparameters})
        values = {field.name: getattr(loss, field.name) for field in fields(loss)}
        kind: Any = type(loss)
        return _with_mode(kind)(**{**values, "loss_agg_mode": MODES[mode]})

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss, (), and verl's metrics.

        Raises:
            ValueError: an unknown mode or one that the loss does not have, or a global count that is missing.
        """
        mode = self._mode(loss_agg_mode)
        loss = self.loss(mode, config)
        mask = response_mask.bool()
        inputs: dict[str, Any] = {"advantage": advantages}
        if "old_logp" in loss.needs:
            inputs["old_logp"] = old_log_prob
        if rollout_is_weights is not None:
            inputs["importance_weight"] = _weights(rollout_is_weights, mask, loss)
        # geo_mean is a mean over the sequences of the call, whatever verl knows of the others
        if loss.name != "gmpo":
            inputs |= _normaliser(mode, mask, _setting(config, "global_batch_info") or {})
        # what stands in for the entropy, which verl measures itself, lets the other metrics be computed
        stats = Stats(logp=log_prob, entropy=torch.zeros_like(log_prob))
        split = self.split if self.split is None or isinstance(self.split, Split) else self.split()
        out = stats_loss(stats, torch.where(mask, 0, IGNORE), loss, split=split, **inputs)
        drift = torch.where(mask, log_prob.detach() - old_log_prob, 0.0)
        return out.loss, _metrics(out.metrics, drift, advantages < 0, mask, getattr(loss, "dual_clip", None))

    def _mode(self, configured: str) -> str:
        if configured not in MODES:
            raise ValueError(f"loss_agg_mode must be one of {', '.join(MODES)}: got {configured!r}")
        mode = self.entry.mode or configured
        if self.entry.refuses and mode != configured:
            raise ValueError(
                f"{self.name} is {mode}, the configuration says {configured}: change loss_agg_mode, or take ppo"
            )
        return mode


def policy_loss(
    name: str, *, split: Split | Callable[[], Split] | None = None, **hyperparameters: Any
) -> PolicyLossFunction:
    """A policy loss with the signature of verl's registry.

    ``fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None)`` takes
    (B, S) tensors and the actor's configuration (``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c``,
    ``tau_pos``, ``policy_loss.*``, ``global_batch_info``), and returns the loss, () and differentiable in
    ``log_prob``, and verl's metrics. Sums are taken in float64.

    Names of verl's losses (``vanilla``, ``gspo``, ``sapo``, ``gpg``, ``clip_cov``, ``kl_cov``, ``geo_mean``,
    ``cispo``) compute what verl computes, but for three things: log-ratios are clamped to +-80 (verl: +-20, of
    ``gspo`` 10), ``clip_cov`` draws its tokens by their order and not by chance, and ``actor/pg_clipfrac`` counts the
    tokens that PPO's clip would act on. The others are fused_po's losses of that name; ``grpo``, ``dapo``, ``dr_grpo``
    and ``luspo`` differ by how they average, and refuse another ``loss_agg_mode``.

    Args:
        name: of ``POLICY_LOSSES``.
        split: scales positive and negative learning (``fused_po.Split``), or a function that returns one, called in
            each step: a schedule. The reported loss is not changed by it, its gradient is.
        hyperparameters: of the loss, in place of what the configuration says.

    Raises:
        ValueError: an unknown name or hyper-parameter, or one that needs what verl does not give to its policy losses:
            it adds KL and entropy itself (``use_kl_loss``, ``entropy_coeff``).
    """
    return PolicyLossFunction(name, split, hyperparameters)


def register_policy_losses(
    names: Iterable[str] | None = None,
    *,
    prefix: str = "fused_po_",
    split: Split | Callable[[], Split] | None = None,
    **hyperparameters: Any,
) -> tuple[str, ...]:
    """Register policy losses with verl, to be chosen by ``actor.policy_loss.loss_mode=fused_po_vanilla``.

    Call it in each worker, for instance in a module that ``actor_rollout_ref.model.external_lib`` names.

    Args:
        names: of ``POLICY_LOSSES``; None: all.
        prefix: before each name; an empty one replaces verl's own losses.
        split, hyperparameters: as in ``policy_loss``, the same for all names.

    Returns:
        The registered names.

    Raises:
        ImportError: no verl.
        ValueError: as ``policy_loss``.
    """
    if find_spec("verl") is None:
        raise ImportError(
            "fused_po.trainers.verl.register_policy_losses() needs verl, which is not installed: pip install verl"
        )
    chosen = tuple(POLICY_LOSSES if names is None else names)
    made = {f"{prefix}{name}": policy_loss(name, split=split, **hyperparameters) for name in chosen}
    register = import_module(REGISTRY).register_policy_loss
    for name, fn in made.items():
        register(name)(fn)
    return tuple(made)


@cache
def _with_mode(kind: Any) -> Any:
    if issubclass(kind, Aggregated):
        return kind
    return dataclass(frozen=True)(type(kind.__name__, (Aggregated, kind), {"__doc__": kind.__doc__}))


def _setting(config: Any, path: str) -> Any:
    """A value of the actor's configuration, an object or a mapping; None where it is not there."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return config


def _normaliser(mode: str, mask: Tensor, info: Mapping[str, Any]) -> dict[str, Number]:
    """What a sum over this call's tokens or sequences is divided by.

    Gradients are averaged over ``dp_size`` ranks, so each divides by its share of the global count.
    """
    ranks = info.get("dp_size") or 1
    if mode == "token-sum":
        return {"num_items": 1.0 / ranks}
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None and ranks > 1:
        raise ValueError(f"global_batch_info needs {name} where dp_size is {ranks}")
    if mode == "token-mean":
        return {} if count is None else {"num_items": count / ranks}
    # sequences without a loss token do not count
    sequences: Number = mask.any(-1).sum() if count is None else count / ranks
    if mode == "seq-mean-token-sum-norm":
        sequences = sequences * (info.get("loss_scale_factor") or mask.shape[-1])
    return {"num_sequences": sequences}


def _weights(weights: Tensor, mask: Tensor, loss: PolicyLoss) -> Tensor:
    """The sampler's weights: per token, or of GMPO one per sequence, their geometric mean, as in verl."""
    if loss.name != "gmpo":
        return weights
    logs = torch.where(mask, (weights + 1e-10).log(), 0.0)
    return (logs.sum(-1) / mask.sum(-1).clamp_min(1)).exp()


def _metrics(
    found: dict[str, Tensor], drift: Tensor, falling: Tensor, mask: Tensor, dual_clip: float | None
) -> dict[str, float]:
    """verl's metrics, one transfer from the device.

    Args:
        found: of the loss.
        drift: (B, S), log-ratios, 0 where masked.
        falling: (B, S) bool, where the advantage is negative.
        mask: (B, S) bool.
        dual_clip: the bound on the ratio there; None: there is none.
    """
    count = mask.sum().clamp_min(1)
    zero = torch.zeros_like(count).double()
    bounded = zero if dual_clip is None else (falling & (drift.exp() > dual_clip)).sum() / count
    values = {
        "actor/pg_clipfrac": found.get("clip_ratio/region_mean", zero),
        "actor/ppo_kl": -drift.double().sum() / count,
        "actor/pg_clipfrac_lower": bounded,
    }
    if "vespo/phi_seq_mean" in found:
        values["actor/vespo_phi"] = found["vespo/phi_seq_mean"]
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
