"""Gradients of one checkpoint: G by groups of tokens, and whether successive updates agree."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch

from fused_po.diagnostics import Examples, gradient_alignment
from fused_po.losses import create
from fused_po.study.evaluation import pass_at
from fused_po.study.learners import pair_examples
from fused_po.study.moment import SIDES, Moment, nll_gradient, slopes, successive
from fused_po.study.policy import Language, new_model, tiny_tokenizer, token_logp
from fused_po.study.settings import METHODS
from fused_po.study.task import all_prompts, demonstration
from fused_po.trainers.batches import AnswerBatch


def _moment(method, device="cpu"):
    """A model that has left its start, D and D'."""
    language = Language(tiny_tokenizer())
    start, model = (new_model(language.tokenizer, 32, 2, seed).eval() for seed in (0, 1))
    prompts, _ = all_prompts(14, 0.15, 0)
    draw = random.Random(0)
    texts = [language.written(p, demonstration(p, 0.5, draw)) for p in prompts]
    target = language.pad(texts, torch.device(device))
    target = Examples({"input_ids": target.input_ids, "attention_mask": target.attention_mask}, target.labels)
    if method == "dpo":
        pairs = [(one, other) for one, other in zip(texts, texts[5:], strict=False)]
        return model, [pair_examples(start, language, pairs, torch.device(device))], create("sigmoid", beta=0.1), target
    torch.manual_seed(0)
    draws = []
    for _ in range(2):
        d = language.pad([language.written(p, demonstration(p, 0.5, draw)) for p in prompts], torch.device(device))
        advantage = torch.randn(d.labels.shape).where(d.labels >= 0, 0.0)
        draws.append(
            Examples({"input_ids": d.input_ids, "attention_mask": d.attention_mask}, d.labels, {"advantage": advantage})
        )
    return model, draws, create("ppo"), target


@pytest.mark.parametrize("method", METHODS)
def test_g_is_that_of_the_diagnostic(method):
    model, draws, loss, target = _moment(method)
    moment = Moment.of(model, draws, loss)
    direction = nll_gradient(model, target)
    # each draw is one D
    each = [gradient_alignment(model, [one], loss, [target], method="exact") for one in draws]
    truth = {part: fmean(one[part] for one in each) for part in each[0].values}
    parts = moment.by_group(direction)
    scale = 1e-4 * sum(abs(truth[side]) for side in SIDES)
    for side in SIDES:
        for suffix in ("", "/no_reweighting"):
            assert parts[f"G/{side}{suffix}"] == pytest.approx(truth[f"{side}{suffix}"], abs=scale)
    g, cosines = moment.towards(direction[None])
    assert g.mean().item() == pytest.approx(truth["whole"], abs=scale)
    size = moment.wholes.mean(0).norm() * direction.norm()
    assert cosines.item() == pytest.approx(truth["whole"] / size.item(), abs=1e-4)


def test_slopes_are_those_of_log_probs():
    model, draws, _, target = _moment("ppo")
    direction = nll_gradient(model, target)
    found = slopes(model, draws[0], direction)
    assert (found[draws[0].labels < 0] == 0).all()
    given = draws[0].inputs
    logp = token_logp(model, AnswerBatch(given["input_ids"], given["attention_mask"], draws[0].labels))
    parameters = list(model.parameters())
    for row, column in (draws[0].labels >= 0).nonzero()[::40].tolist():
        own = torch.autograd.grad(logp[row, column], parameters, retain_graph=True)
        slope = torch.cat([one.reshape(-1) for one in own]).double() @ direction
        assert found[row, column].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_thirds_are_of_a_side_and_not_the_side_itself(method):
    model, draws, loss, _ = _moment(method)
    for own in Moment.of(model, draws, loss).tokens:
        for sign in SIDES.values():
            rows = own.role * sign > 0
            sizes = [int((own.third[rows] == number).sum()) for number in range(3)]
            assert sum(sizes) == int(rows.sum())
            if method == "ppo":
                assert max(sizes) - min(sizes) <= 1
            # the first third weighs most
            weights = [own.c[rows & (own.third == number)].abs() for number in range(3)]
            assert weights[0].min() >= weights[1].max() and weights[1].min() >= weights[2].max()


def test_moving_targets_are_seen():
    """A loss that learns D' itself leads straight towards D'."""
    model, _, _, target = _moment("dpo")
    given = {"advantage": torch.ones(target.labels.shape)}
    moment = Moment.of(model, [Examples(target.inputs, target.labels, given)], create("ppo"))
    assert moment.towards(nll_gradient(model, target)[None])[1].item() == pytest.approx(1.0, abs=1e-5)


def test_the_cosine_of_successive_gradients_leaves_the_drawing_out():
    torch.manual_seed(0)
    first, second = torch.randn(2, 200, dtype=torch.float64)
    truth = (first @ second / (first.norm() * second.norm())).item()
    exact = successive(first[None], second[None])
    assert exact["successive"] == pytest.approx(truth) == exact["successive/uncorrected"]
    turned = first + 0.5 * second
    truth = torch.cosine_similarity(first, turned, dim=0).item()
    found = [successive(*(one + 2.0 * torch.randn(4, 200).double() for one in (first, turned))) for _ in range(400)]
    mean = sum(one["successive"] for one in found) / 400
    raw = sum(one["successive/uncorrected"] for one in found) / 400
    assert mean == pytest.approx(truth, abs=0.03) and raw < truth - 0.25
    # the length of what is nothing can't be estimated
    assert any(math.isnan(successive(*torch.randn(2, 4, 200).double())["successive"]) for _ in range(20))


def test_passes_are_without_bias():
    assert pass_at(8, [0, 1, 8], 8) == pytest.approx(2 / 3)
    assert pass_at(1, [2, 4], 8) == pytest.approx(3 / 8)
    # the share of pairs of five answers, two of them right, that hold a right one
    assert pass_at(2, [2], 5) == pytest.approx(7 / 10)
