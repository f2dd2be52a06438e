"""Advantages and rollout weights against loops written from their equations, and against TRL's own lines."""

from __future__ import annotations

import ast
import importlib.util
import math
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_po import linear_loss, losses
from fused_po.advantages import MODES, SCALES, gae, group_relative, leave_one_out, reinforce_plus_plus, whiten
from fused_po.advantages import rollout_importance_weight as weigh

NAN, INF, F64 = math.nan, math.inf, torch.float64
same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
quick = settings(max_examples=50, deadline=None)
widths = st.lists(st.integers(0, 9), max_size=5)
seeds, unit = st.integers(0, 2**31), st.floats(0.0, 1.0)

# functions of two tensors per token
LAYOUTS = {
    "gae": lambda a, b, mask=None, **cu: gae(a, b, mask, gamma=0.9, lam=0.8, **cu)[0],
    "gae-returns": lambda a, b, mask=None, **cu: gae(a, b, mask, gamma=0.9, lam=0.8, **cu)[1],
    "reinforce++": lambda a, b, mask=None, **cu: reinforce_plus_plus(a, mask, gamma=0.9, **cu),
    **{f"weight-{mode}": partial(weigh, mode=mode, clip_max=1.5, clip_min=0.4) for mode in MODES},
}
MASKED = {**LAYOUTS, "whiten": lambda a, b, mask: whiten(a, mask)}
ALL = {
    **MASKED,
    "group": lambda a, b, mask: group_relative(a[:, 0], num_generations=2),
    "rloo": lambda a, b, mask: leave_one_out(a[:, 0], groups=mask[:, 0].int()),
}


def tensor(values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def make(lengths, seed):
    """Two random (B, S) tensors, a mask with holes and one without; both are False behind each length."""
    torch.manual_seed(seed)
    shape = (len(lengths), max(lengths, default=0) + 2)
    inside = torch.arange(shape[1]) < tensor(lengths, torch.int64)[:, None]
    return torch.randn(shape, dtype=F64), torch.randn(shape, dtype=F64), inside & (torch.rand(shape) < 0.7), inside


def rows(*tensors):
    return zip(*(t.tolist() for t in tensors), strict=True)


def carried(rewards, values, mask, gamma, lam):
    """GAE backwards over one sequence; what is carried passes over tokens without loss."""
    following = running = 0.0
    advantages = [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        if mask[t]:
            running = rewards[t] + gamma * following - values[t] + gamma * lam * running
            following, advantages[t] = values[t], running
    return advantages


@quick
@given(widths, seeds, unit, unit)
def test_gae_carries_over_masked_tokens(lengths, seed, gamma, lam):
    rewards, values, mask, _ = make(lengths, seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    wanted = tensor([carried(*row, gamma, lam) for row in rows(rewards, values, mask)]).reshape(mask.shape)
    same(advantages, wanted)
    same(returns, torch.where(mask, wanted + values, 0.0))
    assert torch.equal(gae(rewards, values, mask)[0], gae(rewards, values, mask, gamma=1.0, lam=0.95)[0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 1.0), (0.5, 0.0), (0.0, 0.5)])
def test_gae_is_the_sum_of_the_paper(gamma, lam):
    rewards, values, _, _ = make([48, 48], 0)
    wanted = []
    for reward, value in rows(rewards, values):
        value = [*value, 0.0]
        deltas = [r + gamma * value[t + 1] - value[t] for t, r in enumerate(reward)]
        wanted.append([math.fsum((gamma * lam) ** i * d for i, d in enumerate(deltas[t:])) for t in range(len(deltas))])
    same(gae(rewards, values, gamma=gamma, lam=lam)[0], tensor(wanted))


@quick
@given(widths, seeds, unit)
def test_reinforce_plus_plus_is_a_whitened_return_to_go(lengths, seed, gamma):
    rewards, _, mask, _ = make(lengths, seed)
    returns = []
    for reward, keep in rows(rewards, mask):
        kept = [r for r, k in zip(reward, keep, strict=True) if k]
        returns += [math.fsum(gamma**i * r for i, r in enumerate(kept[t:])) for t in range(len(kept))]
    variance = stdev(returns) ** 2 if len(returns) > 1 else 0.0
    wanted = tensor([(x - fmean(returns)) / math.sqrt(variance + 1e-8) for x in returns])
    # what rounding leaves of a difference is divided by the std, sqrt(eps) at the least
    torch.testing.assert_close(reinforce_plus_plus(rewards, mask, gamma=gamma)[mask], wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(reinforce_plus_plus(rewards, mask), reinforce_plus_plus(rewards, mask, gamma=1.0))


@quick
@given(st.lists(st.integers(4, 9), min_size=1, max_size=4), seeds, st.floats(-100.0, 100.0), st.floats(0.1, 100.0))
def test_whitening_gives_moments_0_and_1(lengths, seed, shift, spread):
    values, _, _, mask = make(lengths, seed)
    values = values * spread + shift
    white, kept = whiten(values, mask)[mask], whiten(values, mask, shift_mean=False)[mask]
    variance = values[mask].var().item()
    assert white.mean().item() == pytest.approx(0.0, abs=1e-11)
    assert white.var().item() == pytest.approx(variance / (variance + 1e-8), rel=1e-11)
    same(kept - white, values[mask].mean().expand_as(white))


def test_whitening_one_token_or_none_or_equal_ones_is_finite():
    values, mask = tensor([[3.0, NAN], [5.0, 7.0]]), torch.tensor([[True, False], [False, False]])
    assert whiten(values, mask).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert whiten(values, mask, shift_mean=False).tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert not whiten(values, torch.zeros_like(mask)).any()
    assert not whiten(torch.full((2, 7), 0.1, dtype=torch.float32)).any()
    assert whiten(tensor([1.0, 3.0]), eps=2.0).tolist() == [-0.5, 0.5]
    # what is wrong at a loss token shows
    assert whiten(tensor([1.0, NAN, 2.0])).isnan().all()


@pytest.mark.parametrize("name", LAYOUTS)
@quick
@given(widths, seeds)
def test_layouts_agree_bit_for_bit(name, lengths, seed):
    a, b, mask, inside = make(lengths, seed)
    padded = LAYOUTS[name](a, b, mask)
    # masked tokens travel along, then they are dropped
    for keep, options in ((inside, {"mask": mask[inside]}), (mask, {"mask": mask[mask]}), (mask, {})):
        bounds = tensor([0, *keep.sum(1).tolist()], torch.int32).cumsum(0, dtype=torch.int32)
        packed = LAYOUTS[name](a[keep], b[keep], cu_seqlens=bounds, **options)
        assert torch.equal(packed, padded if "sequence" in name else padded[keep])


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e300])
@settings(max_examples=15, deadline=None)
@given(widths, seeds)
def test_masked_tokens_do_not_matter_and_hold_0(name, garbage, lengths, seed):
    a, b, mask, _ = make(lengths, seed)
    clean = MASKED[name](a, b, mask)
    assert clean.isfinite().all()
    assert torch.equal(MASKED[name](a.where(mask, garbage), b.where(mask, garbage), mask), clean)
    assert "sequence" in name or not clean[~mask].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_empty_batches(name):
    for shape in [(0, 3), (2, 0), (0, 0)]:
        got = LAYOUTS[name](torch.zeros(shape), torch.zeros(shape), torch.ones(shape, dtype=torch.bool))
        assert got.shape == (shape[:1] if "sequence" in name else shape)
    for count in (0, 1, 3):
        got = LAYOUTS[name](torch.zeros(0), torch.zeros(0), cu_seqlens=torch.zeros(count + 1, dtype=torch.int64))
        assert got.shape == ((count,) if "sequence" in name else (0,))
    # without bounds it is one sequence
    assert LAYOUTS[name](torch.zeros(4), torch.zeros(4)).shape == ((1,) if "sequence" in name else (4,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("name", ALL)
def test_computes_in_float64_and_returns_the_dtype_without_gradient(name, dtype):
    a, b, mask, _ = make([9, 4, 0, 7], 2)
    # the second input may have another dtype
    a, b = a.to(dtype).requires_grad_(), b.bfloat16().requires_grad_()
    got = ALL[name](a, b, mask)
    assert got.dtype == dtype and not got.requires_grad
    assert torch.equal(got, ALL[name](a.double(), b.double(), mask).to(dtype))


def group_loop(rewards, groups, scale, eps=1e-4):
    """The advantage of GRPO in each scale and that of RLOO, from lists."""
    out = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        known = [(j, r, g) for j, (r, g) in enumerate(zip(rewards, groups, strict=True)) if not math.isnan(r)]
        others = [r for j, r, g in known if g == group and not (scale == "rloo" and i == j)]
        pool = others if scale == "group" else [r for _, r, _ in known]
        std = stdev(pool) if scale in ("group", "batch") and len(pool) > 1 else 0.0
        scored = others and not math.isnan(reward)
        out.append((reward - fmean(others)) / (std + eps if scale in ("group", "batch") else 1.0) if scored else 0.0)
    return tensor(out)


@quick
@given(st.lists(st.tuples(st.floats(-50.0, 50.0) | st.just(NAN), st.integers(-2, 3)), max_size=12))
def test_groups_of_any_order_and_size(pairs):
    rewards, ids = [r for r, _ in pairs], [g for _, g in pairs]
    for scale in SCALES:
        got = group_relative(tensor(rewards), groups=tensor(ids, torch.int64), scale=scale)
        # a mean of 50 is rounded to 1e-14, which is divided by eps
        torch.testing.assert_close(got, group_loop(rewards, ids, scale), rtol=1e-10, atol=1e-9)
    same(leave_one_out(tensor(rewards), groups=tensor(ids, torch.int32)), group_loop(rewards, ids, "rloo"))


@quick
@given(st.integers(1, 5), st.integers(0, 4), seeds)
def test_blocks_are_groups_and_means_are_0(size, count, seed):
    torch.manual_seed(seed)
    rewards, shuffle = torch.randn(size * count, dtype=F64), torch.randperm(size * count)
    blocks = torch.arange(count).repeat_interleave(size)
    for function in (group_relative, leave_one_out):
        got = function(rewards, num_generations=size)
        assert torch.equal(got, function(rewards, groups=blocks))
        same(function(rewards[shuffle], groups=blocks[shuffle]), got[shuffle])
        same(got.view(count, size).mean(1), torch.zeros(count, dtype=F64))
    centred = group_relative(rewards, num_generations=size, scale="none")
    same(leave_one_out(rewards, num_generations=size), centred * size / max(size - 1, 1))
    if size > 1 and count > 0:
        std = rewards.view(count, size).std(1).repeat_interleave(size)
        same(group_relative(rewards, num_generations=size, eps=0.5), centred / (std + 0.5))


@pytest.mark.parametrize("rewards", [[0.1] * 4, [NAN] * 4, [2.0, NAN, NAN, 5.0], []])
def test_groups_without_a_signal_get_0(rewards):
    for dtype in (torch.float16, torch.float32):
        given = tensor(rewards, dtype)
        for options in ({"num_generations": 1}, {"num_generations": 2}, {"groups": torch.arange(len(rewards))}):
            for got in (leave_one_out(given, **options), *(group_relative(given, scale=s, **options) for s in SCALES)):
                assert got.shape == given.shape and not got.any()


@cache
def trl_lines(file: str, first: str, last: str):
    """The statements of TRL's trainer from the one that starts with ``first`` to the one that starts with ``last``."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed: nothing to compare with")
    tree = ast.parse((Path(spec.origin).parent / "trainer" / file).read_text(encoding="utf-8"))
    for block in (getattr(node, name, None) for node in ast.walk(tree) for name in ("body", "orelse")):
        lines = [ast.unparse(node) for node in block] if isinstance(block, list) else []
        starts = [i for i, line in enumerate(lines) if line.startswith(first)]
        ends = [i for i, line in enumerate(lines) if line.startswith(last)]
        if starts and ends:
            return compile("\n".join(lines[starts[0] : ends[-1] + 1]), file, "exec")
    raise AssertionError(f"{file} of TRL has no statements from {first!r} to {last!r} any more")


def run_trl(file, first, last, names):
    names |= {"torch": torch, "math": math}
    exec(trl_lines("utils.py", "def nanstd", "def nanstd"), names)
    # its count / (count - 1) is in the default dtype
    torch.set_default_dtype(F64)
    try:
        exec(trl_lines(file, first, last), names)
    finally:
        torch.set_default_dtype(torch.float32)
    return names


def trl_advantages(file, rewards, num_generations, **options):
    options |= {"multi_objective_aggregation": "sum_then_normalize", "reward_weights": torch.ones(1, dtype=F64)}
    trainer = SimpleNamespace(reward_clip_range=None, beta=0.0, normalize_advantages=False, **options)
    names = {"self": trainer, "rewards_per_func": rewards[:, None], "num_generations": num_generations, "device": None}
    return run_trl(file, "unscorable_mask", "advantages = torch.nan_to_num", names)["advantages"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-50.0, 50.0) | st.sampled_from([NAN, INF, -INF]), min_size=1, max_size=12), st.integers(1, 6))
def test_groups_are_those_of_trl(rewards, size):
    size = min(size, len(rewards))
    rewards = tensor(rewards[: len(rewards) // size * size])
    for scale in SCALES:
        wanted = trl_advantages("grpo_trainer.py", rewards, size, scale_rewards=scale)
        got = group_relative(rewards, num_generations=size, scale=scale)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-9)
    same(leave_one_out(rewards, num_generations=size), trl_advantages("rloo_trainer.py", rewards, size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bounds", [(3.0, None), (1.2, 0.9), (None, 1.0), (1.05, None), (1.0, 0.0)])
def test_weights_are_those_of_trl(mode, bounds):
    old, noise, mask, _ = make([6, 3, 0, 9, 1], 5)
    sampling = old + 0.2 * noise
    sampling[0, 1], sampling[3], sampling[4] = NAN, old[3], INF
    options = {"clip_max": bounds[0], "clip_min": bounds[1], "mode": mode}
    trainer = SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in options.items()})
    names = {"self": trainer, "completion_mask": mask.int(), "tool_mask": None}
    names |= {"old_per_token_logps": old, "sampling_per_token_logps": sampling}
    first, last = "mask = completion_mask if tool_mask is None", "if self.vllm_importance_sampling_mode in"
    wanted = run_trl("grpo_trainer.py", first, last, names)["vllm_importance_sampling_ratio"]
    assert wanted.unique().numel() > 1
    assert torch.equal(weigh(old, sampling, mask), weigh(old, sampling, mask, mode="sequence_mask", clip_max=3.0))
    same(weigh(old, sampling, mask, **options), wanted.squeeze(1) if "sequence" in mode else wanted * mask)


@pytest.mark.parametrize("mode", MODES)
@quick
@given(widths, seeds, st.sampled_from([(3.0, None), (None, 0.4), (1.3, 0.8)]), st.sampled_from([1.0, 1e3]))
def test_weights_are_their_definition(mode, lengths, seed, clip, spread):
    old, sampling, mask, _ = make(lengths, seed)
    old *= spread
    got = weigh(old, sampling, mask, mode=mode, clip_max=clip[0], clip_min=clip[1])
    kept = [[a - b for a, b, keep in zip(*row, strict=True) if keep] for row in rows(old, sampling, mask)]
    if mode.startswith("token"):
        got, kept = got[mask], [[d] for row in kept for d in row]
    weights = [math.exp(min(math.fsum(differences), 80.0)) for differences in kept]
    low, high = clip[1] or 0.0, clip[0] or INF
    bounded = [min(max(w, low), high) if "truncate" in mode else w if low <= w <= high else 0.0 for w in weights]
    torch.testing.assert_close(got, tensor(bounded), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_always_finite(mode, dtype):
    values = tensor([-INF, -3e4, -1.0, 0.0, 3e4, INF, NAN], dtype)
    old, sampling = values.repeat_interleave(7)[:, None], values.repeat(7)[:, None]
    bounds = {None: min(math.exp(80.0), torch.finfo(dtype).max), 3.0: 3.0 if "truncate" in mode else 0.0}
    for clip_max, huge in bounds.items():
        got = weigh(old, sampling, mode=mode, clip_max=clip_max, clip_min=0.0).reshape(7, 7)
        assert got.isfinite().all()
        assert (got[6] == 1.0).all() and (got[:, 6] == 1.0).all() and (got.diag() == 1.0).all()
        assert got[4, 0] == got[4, 1] == got[5, 3] == tensor(huge, dtype)
        assert got[0, 3] == got[1, 4] == 0.0
    far = tensor([[INF, INF, -INF, -INF]], dtype)
    assert weigh(far, torch.zeros_like(far), clip_max=None).tolist() == [1.0]


@pytest.mark.parametrize("mode", MODES)
def test_linear_loss_takes_the_weights(mode):
    torch.manual_seed(0)
    inputs = torch.randn(3, 4, 5), torch.randint(0, 7, (3, 4)), *torch.randn(2, 3, 4)
    inputs[1][1, 2:] = -100
    for where in ({}, {"cu_seqlens": torch.tensor([0, 4, 8, 12])}):
        hidden, labels, old, sampling = (t.flatten(0, 1) for t in inputs) if where else inputs
        got = weigh(old, sampling, labels != -100, mode=mode, clip_max=1.4, **where)
        spread = got if got.shape == labels.shape else got.repeat_interleave(4).reshape(labels.shape)
        loss = partial(linear_loss, hidden, torch.ones(7, 5), labels, losses.create("ppo"), **where)
        weighted = loss(advantage=torch.ones(3), importance_weight=got).loss
        torch.testing.assert_close(weighted, loss(advantage=spread).loss)


R, M, C = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 2, 6])
P, G, META = torch.zeros(6), torch.tensor([0, 0, 1, 1, 2, 2]), torch.device("meta")
BAD = [
    (gae, (R, R, M.int()), {}, "mask must be a bool tensor: got torch.int32"),
    (whiten, (R, M[:1]), {}, r"mask must have .* of values, \(2, 3\) on cpu: got \(1, 3\)"),
    (gae, (P, P, M), {"cu_seqlens": C}, r"mask must have .* of rewards, \(6,\) on cpu: got \(2, 3\)"),
    (whiten, (R, M.to(META)), {}, r"mask must have .*: got \(2, 3\) on meta"),
    (gae, (R, R[:, :2]), {}, r"values must have .* of rewards, \(2, 3\) .*: got \(2, 2\)"),
    (gae, (R, R.long()), {}, "values must be a floating point tensor: got torch.int64"),
    (reinforce_plus_plus, ([1.0],), {}, "rewards must be a floating point tensor: got list"),
    (reinforce_plus_plus, (R[None],), {}, r"rewards must be \(B, S\), or packed .*got \(1, 2, 3\)"),
    (gae, (R, R), {"cu_seqlens": C}, r"rewards packed \(N,\): got \(3,\) and \(2, 3\)"),
    (gae, (P, P), {"cu_seqlens": C[None]}, r"cu_seqlens must be \(B \+ 1,\).*got \(1, 3\) and \(6,\)"),
    (gae, (P, P), {"cu_seqlens": C.float()}, "cu_seqlens must be an integer tensor: got torch.float32"),
    (gae, (P, P), {"cu_seqlens": C[:2]}, r"rise from 0 to 6.*: got \[0, 2\]"),
    (gae, (P, P), {"cu_seqlens": C[1:]}, r"rise from 0 to 6.*: got \[2, 6\]"),
    (gae, (P, P), {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, r"got \[0, 4, 2, 6\]"),
    (gae, (P, P), {"cu_seqlens": torch.tensor([0, 9, 6])}, r"got \[0, 9, 6\]"),
    (gae, (P, P), {"cu_seqlens": C[:0]}, r"rise from 0 to 6.*: got \[\]"),
    (gae, (R, R), {"gamma": 1.01}, r"gamma must lie in \[0, 1\]: got 1.01"),
    (gae, (R, R), {"lam": -0.1}, r"lam must lie in \[0, 1\]: got -0.1"),
    (reinforce_plus_plus, (R,), {"gamma": NAN}, r"gamma must lie in \[0, 1\]: got nan"),
    (whiten, (R,), {"eps": 0.0}, "eps must be positive: got 0.0"),
    (group_relative, (P,), {"num_generations": 2, "eps": NAN}, "eps must be positive: got nan"),
    (group_relative, (P,), {"num_generations": 2, "scale": "std"}, "scale 'std': expected one of group, b"),
    (group_relative, (P,), {}, "either num_generations or groups: got neither"),
    (leave_one_out, (P,), {"num_generations": 2, "groups": G}, "either num_generations or groups: got both"),
    (leave_one_out, (P,), {"num_generations": 4}, "must divide the 6 rewards: got 4"),
    (leave_one_out, (P,), {"num_generations": 0}, "must divide the 6 rewards: got 0"),
    (leave_one_out, (P,), {"groups": G > 0}, "groups must be an integer tensor: got torch.bool"),
    (group_relative, (P,), {"groups": G[:3]}, r"groups must have .*\(6,\) on cpu: got \(3,\)"),
    (group_relative, (P,), {"groups": G.to(META)}, "groups must have .* on meta"),
    (group_relative, (R,), {"groups": M.int()}, r"rewards must be \(B,\).*: got \(2, 3\)"),
    (leave_one_out, (G * 1j,), {"groups": G}, "rewards must be a floating point tensor: got torch.complex64"),
    (weigh, (R, R), {"mode": "mask"}, "unknown mode 'mask': expected one of token_tr"),
    (weigh, (R, P), {}, r"sampling_logp must have .* of old_logp.*: got \(6,\)"),
    (weigh, (R, R), {"clip_max": NAN}, "clip_max must not be negative: got nan"),
    (weigh, (R, R), {"clip_min": -1.0}, "clip_min must not be negative: got -1.0"),
    (weigh, (R, R), {"clip_min": 3.0}, "below clip_max: got 3.0 and 3.0"),
    (weigh, (R, R), {"clip_max": None, "mode": "token_truncate"}, "needs clip_max or"),
]


@pytest.mark.parametrize(("function", "arguments", "options", "message"), BAD, ids=[case[3] for case in BAD])
def test_bad_input_is_refused(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
