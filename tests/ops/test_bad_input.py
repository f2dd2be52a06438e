"""Bad input: one clear sentence that says what was got and what was wanted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fused_po import losses
from fused_po.ops import linear_loss, linear_token_stats, make_plan, stats_loss, token_stats

B, S, H, V = 4, 3, 8, 11
HIDDEN, WEIGHT = torch.randn(B, S, H), torch.randn(V, H)
LABELS = torch.randint(0, V, (B, S))
META = torch.device("meta")


def changed(index: int, value: int) -> torch.Tensor:
    labels = LABELS.clone()
    labels[1, index] = value
    return labels


HEAD_CASES = {
    "hidden 1-D": ({"hidden": HIDDEN[0, 0]}, r"hidden must be \(B, S, H\) or \(N, H\).*got \(8,\) and \(4, 3\)"),
    "labels of another shape": ({"labels": LABELS[:, :2]}, r"got \(4, 3, 8\) and \(4, 2\)"),
    "weight of another width": ({"weight": WEIGHT[:, :5]}, r"weight must be \(V, H\) with H = 8: got \(11, 5\)"),
    "bias of another length": ({"bias": torch.zeros(7)}, r"bias must be \(V,\) with V = 11: got \(7,\)"),
    "integer hidden": ({"hidden": HIDDEN.long()}, "hidden must be floating point: got torch.int64"),
    "label too large": ({"labels": changed(2, V)}, r"lie in \[0, 11\): got 11 at \[1, 2\]"),
    "label negative": ({"labels": changed(0, -1)}, r"got -1 at \[1, 0\]"),
    "label beyond vocab_size": ({"labels": changed(0, 9), "vocab_size": 9}, r"lie in \[0, 9\)"),
    "int32 labels": ({"labels": LABELS.int()}, "labels must be int64: got torch.int32"),
    "weight on another device": ({"weight": WEIGHT.to(META)}, "one device: the first is on cpu, weight on meta"),
    "labels on another device": ({"labels": LABELS.to(META)}, "labels on meta"),
    "vocab_size": ({"vocab_size": 12}, r"vocab_size must lie in \[1, 11\].*got 12"),
    "temperature 0": ({"temperature": 0.0}, "temperature must be a positive number: got 0.0"),
    "temperature of another shape": ({"temperature": torch.ones(3)}, r"temperature must be a number, \(4,\)"),
    "softcap": ({"softcap": -1.0}, "softcap must be a positive number or None: got -1.0"),
    "logit_scale": ({"logit_scale": float("inf")}, "logit_scale must be finite"),
    "scratch": ({"scratch_bytes": -1}, "scratch_bytes must not be negative"),
    "backend": ({"backend": "tritron"}, "unknown backend 'tritron': expected one of"),
}


@pytest.mark.parametrize("case", HEAD_CASES)
@pytest.mark.parametrize("operation", ["linear_loss", "linear_token_stats"])
def test_head(operation, case):
    options, message = HEAD_CASES[case]
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **options}
    with pytest.raises(ValueError, match=message):
        if operation == "linear_loss":
            linear_loss(loss=losses.create("sft"), **arguments)
        else:
            linear_token_stats(**arguments)


@pytest.mark.parametrize(
    ("side_inputs", "message"),
    [
        ({}, "loss 'sigmoid' needs ref_logp"),
        ({"ref_logp": torch.zeros(3)}, r"ref_logp must have shape \(4,\) or \(4, 3\).*got \(3,\)"),
        ({"ref_logp": torch.zeros(4, 1)}, r"got \(4, 1\)"),
        ({"ref_logp": [0.0] * 4}, "ref_logp must be a tensor: got list"),
        ({"ref_logp": torch.zeros(4, device=META)}, "ref_logp on meta"),
        ({"ref_logp": torch.zeros(4), "advantage": torch.zeros(4)}, "does not read advantage; it reads ref_logp"),
        (
            {"ref_logps": torch.zeros(4)},
            r"unknown argument or side input ref_logps \(did you mean ref_logp\?\): expected side inputs among a",
        ),
    ],
)
def test_side_inputs(side_inputs, message):
    with pytest.raises(ValueError, match=message):
        linear_loss(HIDDEN, WEIGHT, LABELS, losses.create("sigmoid"), **side_inputs)


def test_names_that_are_nearly_right():
    loss, logits = losses.create("sigmoid"), HIDDEN @ WEIGHT.t()
    with pytest.raises(ValueError, match=r"argument or side input temprature \(did you mean temperature\?\)"):
        linear_loss(HIDDEN, WEIGHT, LABELS, loss, ref_logp=torch.zeros(4), temprature=2.0)
    with pytest.raises(ValueError, match=r"side input num_item \(did you mean num_items\?\)"):
        stats_loss(token_stats(logits, LABELS), LABELS, loss, ref_logp=torch.zeros(4), num_item=3)
    with pytest.raises(ValueError, match=r"unknown output 'logps' \(did you mean logp\?\)"):
        token_stats(logits, LABELS, outputs=("logps",))
    with pytest.raises(ValueError, match=r"unknown loss 'sigmod' \(did you mean sigmoid\?\)"):
        losses.create("sigmod")
    # nothing is near: no guess
    with pytest.raises(ValueError, match=r"unknown loss 'xyz': expected one of"):
        losses.create("xyz")


def test_temperatures_of_packed_sequences():
    hidden, labels, bounds = HIDDEN.reshape(-1, H), LABELS.reshape(-1), torch.tensor([0, 4, 12])
    temperature = torch.tensor([0.5, 2.0])
    want = linear_token_stats(hidden, WEIGHT, labels, temperature=temperature.repeat_interleave(bounds.diff()))
    found = linear_token_stats(hidden, WEIGHT, labels, temperature=temperature, cu_seqlens=bounds)
    assert torch.equal(found.logp, want.logp)
    message = r"of packed labels must be a number or one per token, \(12,\); .*cu_seqlens, .*: got \(2,\)"
    with pytest.raises(ValueError, match=message):
        linear_token_stats(hidden, WEIGHT, labels, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        token_stats(hidden @ WEIGHT.t(), labels, temperature=temperature)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 12"):
        linear_token_stats(hidden, WEIGHT, labels, temperature=temperature, cu_seqlens=torch.tensor([0, 4, 11]))


@pytest.mark.parametrize("name", ["linear_loss", "linear_token_stats", "token_stats", "stats_loss"])
def test_transforms_of_torch_func_are_refused(name):
    loss, logits = losses.create("sft"), HIDDEN @ WEIGHT.t()
    stats = token_stats(logits, LABELS, outputs=loss.statistics)
    calls = {
        "linear_loss": lambda x: linear_loss(x, WEIGHT, LABELS, loss).loss,
        "linear_token_stats": lambda x: linear_token_stats(x, WEIGHT, LABELS).logp.sum(),
        "token_stats": lambda x: token_stats(x @ WEIGHT.t(), LABELS).logp.sum(),
        "stats_loss": lambda x: stats_loss(replace(stats, logp=x[..., 0]), LABELS, loss).loss,
    }
    for transform in (torch.func.grad, torch.vmap):
        with pytest.raises(RuntimeError, match=rf"^{name} does not run inside torch.func .*: take .backward\(\)"):
            transform(calls[name])(HIDDEN)


def test_a_tensor_of_no_tokens_divides_by_one():
    loss = losses.create("sft")
    zero, one = (linear_loss(HIDDEN, WEIGHT, LABELS, loss, num_items=torch.tensor(n)).loss for n in (0, 1))
    assert torch.equal(zero, one)


def test_results_say_what_they_are_and_not_what_they_hold():
    hidden = HIDDEN.clone().requires_grad_()
    given = {"ref_logp": torch.zeros(4), "split_gradients": True}
    out = linear_loss(hidden, WEIGHT.clone().requires_grad_(), LABELS, losses.create("sigmoid"), **given)
    text = repr(out)
    assert "tensor(" not in text and len(text) < 1000
    assert text.startswith(f"LossOutput(loss={out.loss.item():.6g}, metrics={{")
    assert "stats=Stats(logp: float32 (4, 3), " in text and "is_top1: bool (4, 3)" in text
    assert "SplitGradients(positive, negative, rest; hidden: float32 (4, 3, 8) each, weight: float32 (11, 8)" in text


def test_a_token_loss_wants_reference_log_probs_per_token():
    loss = losses.create("dapo", beta=0.1)
    with pytest.raises(ValueError, match=r"ref_logp token by token: got \(B,\), wanted the shape of labels"):
        linear_loss(HIDDEN, WEIGHT, LABELS, loss, advantage=torch.zeros(4), ref_logp=torch.zeros(4))


def test_desirable_is_bool_and_kl_one_number():
    loss, given = losses.create("kto"), {"ref_logp": torch.zeros(4)}
    with pytest.raises(ValueError, match="desirable must be bool: got torch.int64"):
        linear_loss(HIDDEN, WEIGHT, LABELS, loss, desirable=torch.ones(4).long(), kl=0.0, **given)
    with pytest.raises(ValueError, match=r"kl must have shape \(\): got \(4,\)"):
        linear_loss(HIDDEN, WEIGHT, LABELS, loss, desirable=torch.ones(4).bool(), kl=torch.zeros(4), **given)


def test_other_arguments():
    with pytest.raises(ValueError, match=r"loss must come from fused_po.losses.create\(name\): got 'sigmoid'"):
        linear_loss(HIDDEN, WEIGHT, LABELS, "sigmoid")
    with pytest.raises(ValueError, match="even number of sequences"):
        linear_loss(HIDDEN[:3], WEIGHT, LABELS[:3], losses.create("simpo"))
    with pytest.raises(ValueError, match="even number of sequences"):
        linear_loss(HIDDEN[:3], WEIGHT, LABELS[:3], losses.create("aot"), ref_logp=torch.zeros(3))
    with pytest.raises(ValueError, match="num_items must be one number"):
        linear_loss(HIDDEN, WEIGHT, LABELS, losses.create("sft"), num_items=torch.ones(2))
    for given in ({"num_items": 0}, {"num_sequences": -1}, {"num_items": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be above 0: got"):
            linear_loss(HIDDEN, WEIGHT, LABELS, losses.create("sft"), **given)
    with pytest.raises(ValueError, match=r"cu_seqlens goes with packed labels"):
        linear_loss(HIDDEN, WEIGHT, LABELS, losses.create("sft"), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"weight must be a tensor: got Linear .its .weight"):
        linear_loss(HIDDEN, torch.nn.Linear(H, V), LABELS, losses.create("sft"))
    with pytest.raises(ValueError, match="labels must be a tensor: got ndarray"):
        linear_token_stats(HIDDEN, WEIGHT, LABELS.numpy())
    for temperature in (torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.full(LABELS.shape, -1.0)):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            linear_token_stats(HIDDEN, WEIGHT, LABELS, temperature=temperature)


@pytest.mark.parametrize("fewer", [True, False])
def test_a_plan_of_labels_with_other_loss_tokens(fewer):
    other = LABELS.clone()
    other[0, 0] = -100 if LABELS[0, 0] >= 0 else 1
    plan, labels = (make_plan(LABELS), other) if fewer else (make_plan(other), LABELS)
    with pytest.raises(ValueError, match="the plan is of labels with other loss tokens"):
        linear_token_stats(HIDDEN, WEIGHT, labels, plan=plan)
    for outputs, message in (("logp", "a sequence of names"), ((), "a sequence of names"), (("logprob",), "'logprob'")):
        with pytest.raises(ValueError, match=message):
            linear_token_stats(HIDDEN, WEIGHT, LABELS, outputs=outputs)
        with pytest.raises(ValueError, match=message):
            token_stats(torch.randn(B, S, V), LABELS, outputs=outputs)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.randn(V), torch.tensor(1), "logits must be"),
        (torch.randn(B, S, V), LABELS[:, :2], r"got \(4, 3, 11\) and \(4, 2\)"),
        (torch.randn(B, S, 0), LABELS, "logits must be"),
        (torch.ones(B, S, V).long(), LABELS, "logits must be floating point"),
        (torch.randn(B, S, V), changed(0, V), r"lie in \[0, 11\)"),
        (torch.randn(B, S, V, device=META), LABELS, "labels on cpu"),
    ],
)
def test_token_stats(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        token_stats(logits, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 10.0}, "vocab_size must be a whole number: got 10.0"),
        ({"vocab_size": True}, "vocab_size must be a whole number: got True"),
        ({"temperature": "1"}, "temperature must be a number: got '1'"),
        ({"softcap": "1"}, "softcap must be a number: got '1'"),
        ({"logit_scale": None}, "logit_scale must be a number: got None"),
        (
            {"temperature": torch.ones(2, dtype=torch.complex64)},
            "temperature must hold real numbers: got torch.complex64",
        ),
        ({"ref_logp": torch.ones(2, dtype=torch.complex64)}, "ref_logp must hold real numbers: got torch.complex64"),
        ({"ref_logp": torch.ones(2, dtype=torch.bool)}, "ref_logp must hold real numbers: got torch.bool"),
        ({"scratch_bytes": "1GB"}, "scratch_bytes must be a whole number: got '1GB'"),
        ({"num_items": "3"}, "num_items must be a number: got '3'"),
        ({"max_dropped_mass": "3"}, "max_dropped_mass must be a number: got '3'"),
        ({"backend": 3}, "backend must be a name or None: got 3"),
        ({"plan": "x"}, "plan must come from fused_po.make_plan: got 'x'"),
    ],
)
def test_words_for_values_of_another_kind(options, message):
    arguments = torch.randn(2, 3, 8), torch.randn(11, 8), torch.zeros(2, 3, dtype=torch.int64)
    given = {"ref_logp": torch.zeros(2), **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_loss(*arguments, losses.create("sigmoid"), **given)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoid", {"beta": "0.1"}, "beta must be a number: got '0.1'"),
        ("sigmoid", {"beta": torch.tensor(0.1)}, "beta must be a number: got tensor(0.1000)"),
        ("sigmoid", {"beta": True}, "beta must be a number: got True"),
        ("sigmoid", {"beta": None}, "beta must be a number: got None"),
        ("sigmoid", {"ld_alpha": "a"}, "ld_alpha must be a number or None: got 'a'"),
        ("sigmoid", {"use_weighting": 2}, "use_weighting must be True or False: got 2"),
        ("dr_grpo", {"max_completion_length": 2.5}, "max_completion_length must be a whole number: got 2.5"),
        ("cpo", {"loss_type": 1}, "loss_type must be a word: got 1"),
        (["sigmoid", "sft"], {"beta": "0.1"}, "beta must be a number: got '0.1'"),
        (["sigmoid"], {"loss_weights": ["a"]}, "loss_weights must be finite numbers: got 'a'"),
        ([], {}, "a loss is a name, or a list of names that is not empty: got []"),
        (3, {}, "a loss is a name, or a list of names that is not empty: got 3"),
    ],
)
def test_hyperparameters_of_another_kind(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        losses.create(name, **options)
