"""Random problems: a loss with legal hyper-parameters, a head, labels, side inputs, a layout and a way through them.

Everything follows from one seed. Problems are tiny, so that thousands of them fit into minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from fused_po import Split, losses
from fused_po.losses.batch import OPTIONAL, PER_SEQUENCE, SCALAR, SPREAD, SUMMED, TOKEN_FLAGS
from fused_po.losses.contract import has_sides
from fused_po.losses.policy import PolicyLoss
from fused_po.ops.plain import plain_stats
from fused_po.splits import Linear
from tests.losses.cases import side_inputs

__all__ = ["NARROW", "Problem", "draw", "draw_loss", "takes_sums", "wants_pairs"]

IGNORE = -100
# what a call should not care about; nothing on the CPU works together with what was made on "meta"
DEFAULT_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
DEFAULT_DEVICES = ("cpu", "cpu", "cpu", "meta")
ROUTES = ("linear_loss", "linear_loss", "linear_token_stats", "token_stats")
# float64 is for the reference alone
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _between(low: float, high: float) -> Callable[[Random], float]:
    return lambda rng: rng.uniform(low, high)


def _one_of(*values: Any) -> Callable[[Random], Any]:
    return lambda rng: rng.choice(values)


def _or(other: Any, inner: Callable[[Random], Any]) -> Callable[[Random], Any]:
    return lambda rng: other if rng.random() < 0.5 else inner(rng)


# by name; what a loss refuses (beta = 0 of ipo) is drawn again
HYPERPARAMETERS: dict[str, Callable[[Random], Any]] = {
    "alpha": _or(0.0, _between(-0.5, 0.5)),
    "beta": _or(0.0, _between(0.01, 1.0)),
    "beta_alpha": _between(0.0, 1.0),
    "beta_min": _between(0.0, 0.1),
    "clip_cov_lb": _between(-1.0, 0.2),
    "clip_cov_ratio": _between(0.01, 1.0),
    "clip_cov_ub": _between(0.2, 2.0),
    "cpo_alpha": _or(0.0, _between(0.1, 2.0)),
    "delta": _or(None, _between(0.5, 3.0)),
    "delta_v": _between(-0.5, 0.5),
    "desirable_weight": _or(0.0, _between(0.1, 2.0)),
    "discopop_tau": _between(0.02, 3.0),
    "dpop_lambda": _between(0.0, 60.0),
    "dual_clip": _or(None, _between(1.01, 4.0)),
    "entropy_coef": _or(0.0, _between(-0.1, 0.1)),
    "epsilon": _or(0.0, _between(0.0, 0.5)),
    "epsilon_high": _or(None, _between(0.0, 3.0)),
    "f_alpha_divergence_coef": _or(1.0, _between(-1.0, 2.0)),
    "f_divergence_type": _one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "importance_sampling_level": _one_of("token", "sequence"),
    "kept": _between(0.1, 1.0),
    "kl_cov_ratio": _between(0.01, 1.0),
    "kl_estimator": _one_of("k1", "k2", "k3"),
    "label_smoothing": _or(0.0, _between(0.0, 0.5)),
    "ld_alpha": _or(None, _between(0.0, 1.0)),
    "loss_agg_mode": _one_of("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"),
    "loss_type": _one_of("sigmoid", "hinge", "ipo", "simpo"),
    "max_completion_length": _one_of(1, 7, 256),
    "negative": _or(0.0, _between(0.0, 2.0)),
    "off_policy_mask_threshold": _or(None, _between(-0.5, 0.5)),
    "paired": _one_of(True, False),
    "positive": _or(0.0, _between(0.0, 2.0)),
    "ppo_kl_coef": _or(0.0, _between(0.0, 2.0)),
    "sapo_temperature_neg": _between(0.1, 2.0),
    "sapo_temperature_pos": _between(0.1, 2.0),
    "seed": _one_of(0, 1, 17),
    "shift_weight": _or(1.0, _between(0.0, 1.0)),
    "simpo_gamma": _between(-1.0, 1.0),
    "top_entropy_quantile": _or(1.0, _between(0.0, 1.0)),
    "undesirable_weight": _or(0.0, _between(0.1, 2.0)),
    "use_bias_correction_kl": _one_of(True, False),
    "use_weighting": _one_of(True, False),
    "vespo_k_neg": _between(0.0, 3.0),
    "vespo_k_pos": _between(0.0, 3.0),
    "vespo_lambda_neg": _between(0.0, 3.0),
    "vespo_lambda_pos": _between(0.0, 3.0),
}


def draw_loss(rng: Random, names: tuple[str, ...] = ()) -> losses.Loss:
    """A registered loss, or a mixture of pairwise ones, with random legal hyper-parameters; each is left at its default
    half of the time.
    """
    while True:
        found = _create(rng, rng.choice(names or losses.names()))
        if not names and found is not None and found.horizon == "pair" and rng.random() < 0.1:
            other = _create(rng, rng.choice(("hinge", "sigmoid", "bco_pair", "nca_pair")))
            parts = (found, other, losses.create("sft", paired=True))
            if other is not None:
                found = losses.Mixture(parts, (rng.uniform(-1.0, 1.0), 1.0, rng.uniform(0.0, 1.0)))
        if found is not None:
            return found


def _create(rng: Random, name: str) -> losses.Loss | None:
    named = {}
    for one in fields(type(losses.create(name))):
        if one.init and rng.random() < 0.5:
            named[one.name] = HYPERPARAMETERS[one.name](rng)
    try:
        return losses.create(name, **named)
    except ValueError:
        # illegal together, or at the end of its range
        return None


@dataclass(frozen=True)
class Problem:
    """One call, in padded form; ``layout`` says in which form the operations get it.

    Attributes:
        hidden, weight, bias: (B, S, H), (V, H), (V,) or None, in their dtypes.
        labels: (B, S), -100 from ``rows`` on.
        rows: rows of each sequence where it is packed.
        temperature: a number, (B,) or (B, S).
        side_inputs: (B,), (B, S) or scalars.
        normalisers: ``num_items`` and the like, where given.
        layout: ``padded``, ``static`` (padded, planned by shapes alone) or ``packed``.
        planned: the plan is made before.
        frozen: names of the tensors that need no gradient.
        ambient: the default dtype and device that the call is made under.
    """

    seed: int
    loss: losses.Loss
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    rows: tuple[int, ...]
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    vocab_size: int | None
    side_inputs: dict[str, Any]
    normalisers: dict[str, Any]
    layout: str
    planned: bool
    frozen: frozenset[str]
    split: Split | None
    split_gradients: bool | str
    scratch_bytes: int
    route: str
    ambient: tuple[torch.dtype, str]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of the statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def classes(self) -> int:
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def tensors(self) -> dict[str, Tensor]:
        """Hidden states and head, what there is of it."""
        given = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in given.items() if t is not None}

    def describe(self) -> str:
        """All that tells it from another, in a line."""
        shapes = f"{tuple(self.hidden.shape)} x {tuple(self.weight.shape)}, rows {self.rows}, {self.layout}"
        given = {name: tuple(getattr(v, "shape", ())) for name, v in self.side_inputs.items()}
        return (
            f"seed {self.seed}: {self.route} of {self.loss} on {shapes}, {self.dtype} x {self.weight.dtype}, "
            f"bias {self.bias is not None}, vocab_size {self.vocab_size}, T {self.temperature}, "
            f"softcap {self.softcap}, scale {self.logit_scale}, side inputs {given}, {self.normalisers}, "
            f"planned {self.planned}, frozen {sorted(self.frozen)}, split {self.split}, "
            f"parts {self.split_gradients}, scratch {self.scratch_bytes}, under {self.ambient}"
        )


def draw(seed: int, *, dtypes: tuple[torch.dtype, ...] = (), names: tuple[str, ...] = ()) -> Problem:
    """The problem of a seed."""
    rng = Random(seed)
    torch.manual_seed(seed)
    loss = draw_loss(rng, names)
    dtype = rng.choice(dtypes or (torch.float64, torch.float64, *NARROW))
    batch = 2 * rng.randint(1, 3) if wants_pairs(loss) else rng.randint(1, 5)
    length, width = rng.randint(1, 6), rng.randint(1, 6)
    vocab = rng.choice((1, 2, 3, 5, 17, 33))
    padding = rng.choice((0, 0, 0, 3))
    rows = tuple(rng.choice((0, 1, length, rng.randint(0, length))) for _ in range(batch))
    labels = torch.randint(0, vocab, (batch, length))
    labels[torch.rand(labels.shape) < rng.choice((0.0, 0.0, 0.3, 0.9))] = IGNORE
    layout = rng.choice(("padded", "padded", "static", "packed"))
    if batch == sum(rows) == 1 and layout == "packed":
        # one token, of one sequence: no shape says which
        layout = "padded"
    for row, count in enumerate(rows):
        if layout == "packed" or rng.random() < 0.5:
            labels[row, count:] = IGNORE
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight_dtype = dtype if rng.random() < 0.7 or dtype == torch.float64 else torch.float32
    spread = rng.choice((0.1, 1.0, 3.0))
    hidden = (spread * torch.randn(batch, length, width, dtype=torch.float64)).to(dtype)
    weight = torch.randn(vocab + padding, width, dtype=torch.float64).to(weight_dtype)
    bias = torch.randn(vocab + padding, dtype=torch.float64).to(weight_dtype) if rng.random() < 0.5 else None
    shape = rng.choice(((), (), (batch,), (batch, length)))
    route = rng.choice(ROUTES)
    if route != "linear_loss" and layout == "packed" and shape == (batch,):
        # without cu_seqlens a temperature per sequence has no meaning
        shape = ()
    temperature = (torch.rand(shape, dtype=torch.float64) + 0.5).to(wide)
    problem = Problem(
        seed=seed,
        loss=loss,
        hidden=hidden,
        weight=weight,
        bias=bias,
        labels=labels,
        rows=rows,
        temperature=temperature if shape else rng.choice((1.0, float(temperature))),
        softcap=rng.choice((None, None, 5.0)),
        logit_scale=rng.choice((1.0, 1.0, 0.3, -1.5)),
        vocab_size=vocab if padding else None,
        side_inputs={},
        normalisers={},
        layout=layout,
        planned=rng.random() < 0.3,
        frozen=frozenset(name for name in ("hidden", "weight", "bias") if rng.random() < 0.25),
        split=_split(rng, loss) if rng.random() < 0.3 else None,
        split_gradients=rng.choice((False, False, False, True, "thirds")) if route == "linear_loss" else False,
        scratch_bytes=rng.choice((0, 200, 1000, 5000, 1 << 20)),
        route=route,
        ambient=(rng.choice(DEFAULT_DTYPES), rng.choice(DEFAULT_DEVICES)),
    )
    if not has_sides(loss):
        problem = replace(problem, split=None, split_gradients=False)
    return replace(problem, side_inputs=_side_inputs(rng, problem), normalisers=_normalisers(rng, problem))


def wants_pairs(loss: losses.Loss) -> bool:
    # a mean over the chosen half needs none of the rejected, but halves are what its batch holds
    sides = ("sft",) if getattr(loss, "paired", False) else ()
    return (
        loss.horizon == "pair"
        or loss.name in (*sides, "aot", "aot_unpaired", "beta_dpo", "bco_pair")
        or any(part is not loss for _, part in loss.parts)
    )


def _split(rng: Random, loss: losses.Loss) -> Split | None:
    end = rng.uniform(0.0, 2.0)
    named: dict[str, Any] = {
        "positive": rng.choice((0.0, 1.0, rng.uniform(0.0, 2.0), Linear(0.5, end))),
        "negative": rng.choice((0.0, 1.0, rng.uniform(0.0, 2.0), Linear(1.0, end, 0.2, 0.7))),
        "reweight": rng.choice(("identity", "none", "clip", "power", "tertiles")),
        "by": rng.choice(("role", "role", "direction")),
        "population": rng.choice(("horizon", "batch", "running")),
        "clip_max": rng.uniform(0.1, 2.0),
        "power": rng.choice((0.0, 0.5, 1.0, 2.0)),
        "tertile_gains": (rng.uniform(0, 2), 1.0, rng.choice((0.0, 0.5))),
        "running_mean": rng.uniform(0.0, 1.0),
        "running_tertiles": (0.2, 0.6),
        "progress": rng.random(),
    }
    found = Split(**named)
    try:
        found.horizon(loss)
    except ValueError:
        # a horizon without thirds
        return replace(found, population="batch")
    return found


def _side_inputs(rng: Random, problem: Problem) -> dict[str, Any]:
    """Those that the loss reads, optional ones at times, per token or per sequence where both are legal."""
    loss, labels = problem.loss, problem.labels
    temperature = problem.temperature
    if isinstance(temperature, Tensor) and temperature.ndim == 1:
        temperature = temperature.unsqueeze(1)
    logits = problem.hidden.double() @ problem.weight.double().t()[:, : problem.classes]
    logp = plain_stats(logits, labels, temperature=temperature, outputs=("logp",)).logp
    made = side_inputs(loss, labels, logp)
    found: dict[str, Any] = {}
    for name, value in made.items():
        if name in OPTIONAL and rng.random() < 0.4:
            continue
        if name in SCALAR:
            found[name] = rng.choice((value, float(value)))
            continue
        if name in PER_SEQUENCE or name in TOKEN_FLAGS:
            found[name] = value
            continue
        if name in SPREAD:
            value = torch.where(torch.rand(value.shape) < rng.choice((0.0, 0.0, 0.4)), 0.0, value)
        per_sequence = name in SPREAD or takes_sums(loss, name)
        if value.ndim == 2 and per_sequence and rng.random() < 0.4:
            value = value[:, 0] if name in SPREAD else torch.where(labels >= 0, value, 0.0).sum(1)
        found[name] = value.to(problem.wide)
    return found


def takes_sums(loss: losses.Loss, name: str) -> bool:
    """A log-prob of this name may be given as the sum over its sequence."""
    assert name in SUMMED
    if isinstance(loss, PolicyLoss):
        # its mask reads them token by token
        return loss.name == "rloo" and name == "old_logp" and loss.off_policy_mask_threshold is None
    return True


def _normalisers(rng: Random, problem: Problem) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("num_items", "num_sequences", "num_chosen_items"):
        if rng.random() < 0.3:
            number = rng.choice((1, 7, 2.5))
            found[name] = rng.choice((number, torch.tensor(number)))
    return found
