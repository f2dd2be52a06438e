"""CPO, SimPO, AlphaPO and ORPO against the installed TRL's trainer code, from hidden states to gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fused_po import losses
from tests.oracles.problems import HeadProblem, V
from tests.oracles.trl_trainers import Accelerator

pytest.importorskip("trl", reason="TRL is not installed: its losses are not compared")
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer


def run(trainer_class, problem: HeadProblem, **settings):
    """TRL's value, leaves and metrics. Its labels lie one position further on than ours."""
    hidden, weight = problem.leaves()
    count = problem.labels.shape[0]
    labels = torch.cat([torch.full((count, 1), -100), problem.labels], 1)
    tokens = torch.randint(0, V, labels.shape)
    tokens = torch.where(labels >= 0, labels, tokens)
    last = labels.shape[1] - (labels >= 0).flip(1).long().argmax(1)
    attention = (torch.arange(labels.shape[1]) < last[:, None]).long()
    batch = {}
    for name, rows in (("chosen", slice(None, count // 2)), ("rejected", slice(count // 2, None))):
        batch |= {
            f"{name}_input_ids": tokens[rows],
            f"{name}_attention_mask": attention[rows],
            f"{name}_labels": labels[rows],
        }

    def model(*_, **__):
        logits = hidden @ weight.t()
        # the last position predicts nothing
        return SimpleNamespace(logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], 1))

    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        is_encoder_decoder=False,
        aux_loss_enabled=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=trainer_class.concatenated_inputs,
        get_batch_logps=trainer_class.get_batch_logps,
        **settings,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            method = getattr(trainer_class, name)
            setattr(trainer, name, lambda *a, method=method, **k: method(trainer, *a, **k))
    value, metrics = trainer_class.get_batch_loss_metrics(trainer, model, batch)
    return value, (hidden, weight), metrics, tokens, attention


def compare_metrics(ours: dict, theirs: dict) -> None:
    """All but the mean logits, which TRL takes over prompts too."""
    names = {name for name in theirs if not name.startswith("logits/")}
    assert names == set(ours)
    for name in names:
        assert ours[name].item() == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name


CPO = {
    "sigmoid": {},
    "sigmoid, smoothed": {"label_smoothing": 0.2},
    "sigmoid without NLL": {"cpo_alpha": 0.0},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "simpo_gamma": 0.8},
    "simpo, smoothed": {"loss_type": "simpo", "label_smoothing": 0.2},
    "alpha": {"loss_type": "simpo", "alpha": 0.3},
    "negative alpha": {"loss_type": "simpo", "alpha": -0.5, "cpo_alpha": 0.0},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CPO)
def test_cpo(case, seed):
    problem = HeadProblem(seed)
    settings = {"loss_type": "sigmoid", "beta": 0.4, "label_smoothing": 0.0, "cpo_alpha": 0.7, "simpo_gamma": 0.5}
    settings |= {"alpha": 0.0, **CPO[case]}
    value, leaves, metrics, *_ = run(CPOTrainer, problem, **settings)
    compare_metrics(problem.check(losses.create("cpo", **settings), value, leaves), metrics)


@pytest.mark.parametrize(("name", "alpha"), [("simpo", 0.0), ("alphapo", 0.3)])
def test_names_of_their_own(name, alpha):
    problem = HeadProblem()
    settings = {"beta": 2.0, "label_smoothing": 0.0, "cpo_alpha": 0.0, "simpo_gamma": 0.5, "alpha": alpha}
    value, leaves, metrics, *_ = run(CPOTrainer, problem, loss_type="simpo", **settings)
    loss = losses.create(name, beta=2.0, simpo_gamma=0.5, alpha=alpha)
    compare_metrics(problem.check(loss, value, leaves), metrics)


@pytest.mark.parametrize("seed", range(3))
def test_orpo_with_prompts_in_its_nll(seed):
    problem = HeadProblem(seed)
    value, leaves, metrics, tokens, attention = run(ORPOTrainer, problem, beta=0.3)
    labels = problem.labels.clone()
    half = len(labels) // 2
    labels[:half] = torch.where(attention[:half, 1:] == 1, tokens[:half, 1:], -100)
    mask = (labels >= 0) & (problem.labels < 0)
    assert mask.any()
    loss = losses.create("orpo", beta=0.3)
    compare_metrics(problem.check(loss, value, leaves, labels, nll_mask=mask), metrics)
