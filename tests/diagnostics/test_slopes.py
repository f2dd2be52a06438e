"""The step of the directional estimator: found from the model, its error told, a warning where there is none."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from fused_po import losses, token_stats
from fused_po.diagnostics import Examples, by_layer, gradient_alignment
from fused_po.diagnostics.slopes import along
from tests.losses.cases import create
from tests.test_alignment import Policy, examples, stats_of

SIDES = ("positive", "negative", "rest")


class Sharp(nn.Module):
    """Log-probs that turn quickly along every direction: a step of 1e-3 of the parameters' length is far too long."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(13, 13))
        self.speed = speed

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.speed * self.table)[tokens] * 3.0


def sharp(speed: float, method: str, **options):
    loss = losses.create("sigmoid")
    data, target = examples(loss, 1, 12), examples(None, 3)
    return gradient_alignment(Sharp(speed), [data], loss, [target], method=method, stats=stats_of, **options)


@pytest.mark.parametrize("speed", [1.0, 30.0, 300.0])
def test_the_step_is_found_whatever_the_model(speed):
    exact, fast = sharp(speed, "exact"), sharp(speed, "directional")
    scale = sum(abs(exact[part]) for part in SIDES)
    apart = max(abs(fast[part] - exact[part]) for part in exact.values) / scale
    assert apart <= 0.005 and fast.error <= 0.01
    assert exact.error is None
    if speed == 300.0:
        # what a step of 1e-2 says of this model is far off, and it knows
        with pytest.warns(UserWarning, match=r"uncertain by \d+\.\d % of the sum"):
            fixed = sharp(speed, "directional", step=1e-2)
        assert abs(fixed["whole"] - exact["whole"]) > 0.1 * scale


def test_a_model_whose_log_probs_are_rounded_is_warned_of():
    """Small steps drown in rounding, long ones leave the neighbourhood: no two agree."""

    def coarse(model, inputs, labels, outputs):
        found = token_stats(model(inputs["tokens"]), labels, outputs=tuple(outputs))
        # a rounding that passes gradients on
        return replace(found, logp=found.logp + (found.logp.round(decimals=1) - found.logp).detach())

    loss = losses.create("sigmoid")
    data, target = examples(loss, 1), examples(None, 3)
    with pytest.warns(UserWarning, match="its two steps disagree; method='exact' takes none"):
        found = gradient_alignment(Sharp(30.0), [data], loss, [target], stats=coarse)
    assert found.error > 0.02


def test_what_is_well_known_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in ("sigmoid", "dapo-all"):
            loss = create(case)
            found = gradient_alignment(Policy(), [examples(loss, 1)], loss, [examples(None, 3)], stats=stats_of)
            assert found.error < 0.005


def test_the_error_is_that_of_the_two_steps():
    """f(x) = sin(9 x) at x = 0.3 over a direction of length 2: every slope is known."""
    point = {"x": torch.tensor([0.3], dtype=torch.float64)}
    way = {"x": torch.tensor([2.0], dtype=torch.float64)}

    def measure():
        return {"f": torch.sin(9 * point["x"]).item()}

    found, error = along(way, point, measure, lambda values: abs(values["f"]), 0.1)
    x, h = 0.3, 0.1 * 0.3 / 2
    slopes = [
        (
            torch.sin(torch.tensor(9 * (x + 2 * s), dtype=torch.float64))
            - torch.sin(torch.tensor(9 * (x - 2 * s), dtype=torch.float64))
        ).item()
        / (2 * s)
        for s in (h, h / 4)
    ]
    truth = 18 * torch.cos(torch.tensor(2.7, dtype=torch.float64)).item()
    assert error == pytest.approx(abs((slopes[1] - slopes[0]) / found["f"]), rel=1e-6)
    # the two together are nearer than either
    assert abs(found["f"] - truth) < 0.1 * abs(slopes[1] - truth)
    assert torch.equal(point["x"], torch.tensor([0.3], dtype=torch.float64))


def test_a_direction_of_length_0_has_no_slope():
    point = {"x": torch.ones(3)}
    found, error = along({"x": torch.zeros(3)}, point, lambda: {"f": 1.0}, lambda values: 1.0, None)
    assert found == {"f": 0.0} and error == 0.0


@pytest.mark.parametrize("blocks", [None, by_layer])
@pytest.mark.parametrize("case", ["sigmoid", "dapo-all", "mixture"])
def test_cosine_is_that_of_the_gradients(case, blocks):
    loss = create(case)
    data, target, model = [examples(loss, 1), examples(loss, 2)], [examples(None, 3)], Policy()
    options = {"cosine": True, "blocks": blocks, "stats": stats_of}
    exact = gradient_alignment(model, data, loss, target, method="exact", **options)
    fast = gradient_alignment(model, data, loss, target, **options)
    assert fast.norms == pytest.approx(exact.norms, rel=1e-9)
    assert exact.cosine() == pytest.approx(exact["whole"] / (exact.norms[0] * exact.norms[1]))
    assert abs(exact.cosine()) <= 1
    assert sum(fast.cosine(part) for part in SIDES) == pytest.approx(fast.cosine(), rel=1e-6, abs=1e-9)
    with pytest.raises(ValueError, match="cosine=True"):
        gradient_alignment(model, data, loss, target, stats=stats_of).cosine()


def test_cosine_with_itself_is_1():
    """D' as D of a loss that is its NLL."""
    loss, target = losses.create("sft"), examples(None, 3)
    data = Examples(target.inputs, target.labels)
    options = {"reduction": "token", "stats": stats_of, "cosine": True}
    for method in ("exact", "directional"):
        found = gradient_alignment(Policy(), [data], loss, [target], method=method, **options)
        assert found.cosine() == pytest.approx(1.0, rel=1e-6)
        assert found["whole"] == pytest.approx(found.norms[0] ** 2, rel=1e-6)


def test_target_nll_is_the_mean_over_answers():
    loss, target = create("sigmoid"), [examples(None, 3), examples(None, 4, 4)]
    found = gradient_alignment(Policy(), [examples(loss, 1)], loss, target, stats=stats_of)
    total = 0.0
    for one in target:
        total -= stats_of(Policy(), one.inputs, one.labels, ("logp",)).logp[one.labels >= 0].sum().item()
    assert found.target_nll == pytest.approx(total / 10)


def test_what_is_no_number_is_not_known():
    """A part that is NaN at one step must not hide behind one that is known, whichever is looked at first."""
    point, way = {"x": torch.tensor([1.0], dtype=torch.float64)}, {"x": torch.tensor([1.0], dtype=torch.float64)}
    for names in (("good", "bad"), ("bad", "good")):

        def measure(names=names):
            x = point["x"].item()
            return {name: x * x if name == "good" else float("nan") for name in names}

        _, error = along(way, point, measure, lambda values: abs(values["good"]), None)
        assert error == float("inf")

    def broken(model, inputs, labels, outputs):
        found = stats_of(model, inputs, labels, outputs)
        return found if torch.is_grad_enabled() else replace(found, logp=found.logp * float("nan"))

    loss = losses.create("sigmoid")
    data, target = examples(loss, 1), examples(None, 3)
    with pytest.warns(UserWarning, match="method='exact' takes none"):
        gradient_alignment(Policy(), [data], loss, [target], stats=broken, parts=("whole",))
