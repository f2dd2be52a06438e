"""Policy losses for verl's registry: by their formulas in float64, under each way of averaging, and with a split."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fused_po import Split, losses, splits
from fused_po.losses.policy import PolicyLoss
from fused_po.trainers import verl
from tests.trainers.verl_modules import CORE, installed

B, S = 5, 7
LENGTHS = [7, 4, 0, 1, 5]
LOW, HIGH, DUAL = 0.1, 0.15, 1.3
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def config(**changes):
    """The settings of verl's ``ActorConfig`` that a policy loss reads."""
    policy = {"clip_cov_ratio": 0.1, "clip_cov_lb": -0.5, "clip_cov_ub": 9.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.3}
    found = {
        "clip_ratio": 0.2,
        "clip_ratio_low": LOW,
        "clip_ratio_high": HIGH,
        "clip_ratio_c": DUAL,
        "tau_pos": 0.8,
        "tau_neg": 1.4,
        "policy_loss": SimpleNamespace(**policy),
        "global_batch_info": {},
    }
    return SimpleNamespace(**{**found, **changes})


class Rollout:
    """Log-probs that moved by about 0.3, on sequences of different lengths; nonsense where masked."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.mask = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
        self.logp = (-3 * torch.rand(B, S, dtype=torch.float64)).masked_fill(~self.mask, -50.0).requires_grad_()
        moved = self.logp.detach() + 0.3 * torch.randn(B, S, dtype=torch.float64)
        self.old = torch.where(self.mask, moved, 9.0)
        self.advantage = torch.randn(B, S, dtype=torch.float64)
        self.weights = torch.rand(B, S, dtype=torch.float64) + 0.5

    def __call__(self, name, mode="token-mean", settings=None, weights=None, **options):
        fn = verl.policy_loss(name, **options)
        settings = config() if settings is None else settings
        loss, metrics = fn(self.old, self.logp, self.advantage, self.mask, mode, settings, weights)
        return loss, metrics, torch.autograd.grad(loss, self.logp)[0]


def clipped(ratio, advantage):
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)


def sequence_mean(values, mask):
    return torch.where(mask, values, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def surrogate(name, logp, old, advantage, mask):
    """What each loss computes per token, from its paper."""
    drift = logp - old
    ratio = drift.exp()
    if name == "vanilla":
        return torch.where(
            advantage < 0, torch.minimum(clipped(ratio, advantage), -DUAL * advantage), clipped(ratio, advantage)
        )
    if name in ("ppo", "grpo", "dapo", "dr_grpo", "reinforce_plus_plus"):
        return clipped(ratio, advantage)
    if name == "gspo":
        return clipped(sequence_mean(drift, mask).exp().detach() * (logp - logp.detach()).exp(), advantage)
    if name == "luspo":
        return clipped(sequence_mean(drift, mask).exp().expand(B, S), advantage)
    if name == "sapo":
        tau = torch.where(advantage > 0, torch.full_like(advantage, 0.8), 1.4)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
    if name == "gpg":
        return -advantage * logp
    if name == "cispo":
        return -ratio.clamp(1 - LOW, 1 + HIGH).detach() * advantage * logp
    if name == "w_reinforce":
        return -torch.where(advantage > 0, 0.1 * torch.ones_like(advantage), -1.0) * logp
    raise AssertionError(name)


def averaged(values, mask, mode, tokens=None, sequences=None, scale=None):
    """verl's ``loss_agg_mode``: over loss tokens, and over the sequences that have any."""
    values = torch.where(mask, values, 0.0)
    tokens = mask.sum() if tokens is None else tokens
    sequences = mask.any(1).sum() if sequences is None else sequences
    return {
        "token-mean": values.sum() / tokens,
        "token-sum": values.sum(),
        "seq-mean-token-sum": values.sum() / sequences,
        "seq-mean-token-sum-norm": values.sum() / sequences / (scale or S),
        "seq-mean-token-mean": (values.sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences,
    }[mode]


# the only way of averaging that some have
ONLY = {
    "sapo": "seq-mean-token-mean",
    "grpo": "seq-mean-token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
NAMES = ("vanilla", "ppo", "reinforce_plus_plus", "gspo", "gpg", "cispo", "w_reinforce", *ONLY)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name, mode, weighted):
    rollout = Rollout()
    if name in ("grpo", "dapo", "dr_grpo", "luspo") and mode != ONLY[name]:
        with pytest.raises(ValueError, match=f"{name} is {ONLY[name]}, the configuration says {mode}"):
            rollout(name, mode)
        return
    loss, _, gradient = rollout(name, mode, weights=rollout.weights if weighted else None)
    terms = surrogate(name, rollout.logp, rollout.old, rollout.advantage, rollout.mask)
    terms = terms * rollout.weights if weighted else terms
    wanted = averaged(terms, rollout.mask, ONLY.get(name, mode))
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, rollout.logp)[0], rtol=1e-11, atol=1e-14)
    assert gradient[rollout.mask].abs().sum() > 0 and not gradient[~rollout.mask].any()


@pytest.mark.parametrize("mode", MODES)
def test_global_counts(mode):
    """Of four ranks with 40 tokens and 12 sequences: the mean over ranks of these losses is that over all tokens."""
    rollout = Rollout()
    info = {"dp_size": 4, "batch_num_tokens": 40, "global_batch_size": 12, "loss_scale_factor": 11}
    loss, _, gradient = rollout("vanilla", mode, config(global_batch_info=info))
    terms = surrogate("vanilla", rollout.logp, rollout.old, rollout.advantage, rollout.mask)
    wanted = 4 * averaged(terms, rollout.mask, mode, tokens=40, sequences=12, scale=11)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, rollout.logp)[0], rtol=1e-11, atol=1e-14)
    if mode != "token-sum":
        missing = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        with pytest.raises(ValueError, match=f"global_batch_info needs {missing} where dp_size is 4"):
            rollout("vanilla", mode, config(global_batch_info={"dp_size": 4}))


@pytest.mark.parametrize("weighted", [False, True])
def test_geo_mean(weighted):
    """A mean over all sequences, empty ones too; weights of the sampler enter by their geometric mean."""
    rollout = Rollout()
    info = {"dp_size": 4, "batch_num_tokens": 40, "global_batch_size": 12}
    weights = rollout.weights if weighted else None
    loss, _, gradient = rollout("geo_mean", "token-mean", config(global_batch_info=info), weights)
    drift = rollout.logp - rollout.old
    near = torch.where(rollout.advantage > 0, drift.clamp(max=HIGH), drift.clamp(min=-LOW))
    per_sequence = sequence_mean(near, rollout.mask).exp() * -sequence_mean(rollout.advantage, rollout.mask)
    if weighted:
        per_sequence = per_sequence * sequence_mean(rollout.weights.log(), rollout.mask).exp()
    wanted = per_sequence.mean()
    # verl adds 1e-10 to a weight
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, rollout.logp)[0], rtol=1e-9, atol=1e-14)


def test_kl_cov():
    rollout = Rollout()
    loss = rollout("kl_cov")[0]
    logp, advantage = rollout.logp[rollout.mask], rollout.advantage[rollout.mask]
    drift = logp - rollout.old[rollout.mask]
    covariance = (advantage - advantage.mean()) * (logp - logp.mean()).detach()
    terms = -drift.exp() * advantage
    largest = covariance.topk(int(0.2 * len(terms))).indices
    terms[largest] += 0.3 * drift.abs()[largest]
    torch.testing.assert_close(loss, terms.mean(), rtol=1e-12, atol=0)


def test_clip_cov_drops_candidates():
    rollout = Rollout()
    every = SimpleNamespace(clip_cov_ratio=1.0, clip_cov_lb=-0.5, clip_cov_ub=9.0)
    loss = rollout("clip_cov", settings=config(policy_loss=every))[0]
    logp, advantage = rollout.logp[rollout.mask], rollout.advantage[rollout.mask]
    ratio = (logp - rollout.old[rollout.mask]).exp()
    terms = clipped(ratio, advantage)
    covariance = (advantage - advantage.mean()) * (logp - logp.mean())
    dropped = (covariance > -0.5) & (covariance < 9.0) & ~(terms > -ratio * advantage)
    assert 0 < dropped.sum() < len(terms)
    torch.testing.assert_close(loss, torch.where(dropped, 0.0, terms).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["asymre", "topr", "vespo", "aspo", "psr", "nsr", "gmpo"])
def test_others_are_the_losses_of_their_names(name):
    rollout = Rollout()
    loss, metrics, gradient = rollout(name, "seq-mean-token-mean")
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0
    assert ("actor/vespo_phi" in metrics) == (name == "vespo")
    made = verl.policy_loss(name).loss("seq-mean-token-mean", config())
    assert isinstance(made, PolicyLoss) and made.name == verl.POLICY_LOSSES[name].loss
    assert made.loss_agg_mode == "seq-mean-token-mean"


def test_metrics():
    rollout = Rollout()
    metrics = rollout("vanilla")[1]
    drift, advantage = (rollout.logp - rollout.old)[rollout.mask], rollout.advantage[rollout.mask]
    ratio = drift.exp()
    outside = ((ratio > 1 + HIGH) & (advantage > 0)) | ((ratio < 1 - LOW) & (advantage < 0))
    lower = (ratio > DUAL) & (advantage < 0)
    assert metrics == {
        "actor/pg_clipfrac": pytest.approx(outside.double().mean().item()),
        "actor/ppo_kl": pytest.approx(-drift.mean().item()),
        "actor/pg_clipfrac_lower": pytest.approx(lower.double().mean().item()),
    }
    assert outside.any() and lower.any()
    assert rollout("ppo")[1]["actor/pg_clipfrac_lower"] == rollout("gpg")[1]["actor/pg_clipfrac"] == 0.0


def test_settings_of_the_configuration_and_their_defaults():
    def made(name, settings):
        return verl.policy_loss(name).loss("token-mean", settings)

    assert (made("vanilla", config()).epsilon, made("vanilla", config()).epsilon_high) == (LOW, HIGH)
    only = config(clip_ratio_low=None, clip_ratio_high=None)
    assert (made("vanilla", only).epsilon, made("vanilla", only).epsilon_high) == (0.2, 0.2)
    assert made("sapo", {"tau_pos": 0.5, "policy_loss": {}}).sapo_temperature_pos == 0.5
    assert made("kl_cov", {"policy_loss": {"ppo_kl_coef": 0.7}}).ppo_kl_coef == 0.7
    assert made("ppo", None).epsilon == losses.create("ppo").epsilon
    assert verl.policy_loss("ppo", epsilon=0.5).loss("token-mean", config()).epsilon == 0.5


def test_a_split_scales_the_gradient_and_not_the_loss():
    rollout = Rollout()
    loss, _, gradient = rollout("vanilla")
    step = 0

    def schedule():
        return splits.controlled_ppo(negative=(1.0, 0.0)).at(step)

    for split in (splits.positive_only(), Split(), schedule):
        value, _, found = rollout("vanilla", split=split)
        assert torch.equal(value, loss)
        wanted = torch.where(rollout.advantage > 0, gradient, 0.0) if split == splits.positive_only() else gradient
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    step = 1
    last = rollout("vanilla", split=schedule)[2]
    torch.testing.assert_close(last, torch.where(rollout.advantage > 0, gradient, 0.0), rtol=1e-12, atol=0)


def test_registered_losses_are_called_as_verl_calls_them():
    rollout = Rollout()
    with installed() as modules:
        assert verl.register_policy_losses(["vanilla"], prefix="") == ("vanilla",)
        names = verl.register_policy_losses(split=splits.positive_only())
        core = modules[CORE]
        assert set(core.POLICY_LOSS_REGISTRY) == {"vanilla", *names}
        assert names == tuple(f"fused_po_{name}" for name in verl.POLICY_LOSSES)
        pg_loss, metrics = core.get_policy_loss_fn("fused_po_vanilla")(
            old_log_prob=rollout.old,
            log_prob=rollout.logp,
            advantages=rollout.advantage,
            response_mask=rollout.mask,
            loss_agg_mode="token-mean",
            config=config(),
            rollout_is_weights=None,
        )
    # verl adds its other terms in place
    value = pg_loss.detach().clone()
    total = pg_loss
    total -= 0.1 * rollout.logp[rollout.mask].mean()
    total.backward()
    assert torch.equal(value, rollout("vanilla")[0]) and metrics == rollout("vanilla")[1]
    entropy = -0.1 * rollout.mask.double() / rollout.mask.sum()
    wanted = rollout("vanilla", split=splits.positive_only())[2] + entropy
    torch.testing.assert_close(rollout.logp.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dppo_tv", {}, "unknown policy loss 'dppo_tv': expected one of vanilla"),
        ("ppo", {"gamma": 1.0}, "has no hyper-parameter gamma"),
        ("ppo", {"beta": 0.1}, "no ref_logp, which beta needs"),
        ("ppo", {"entropy_coef": 0.1}, "no entropy, which entropy_coef"),
        ("ppo", {"off_policy_mask_threshold": 0.1}, "no sampling_logp"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        verl.policy_loss(name, **options)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="loss_agg_mode must be one of token-mean, .*: got 'median'"):
        Rollout()("vanilla", "median")
