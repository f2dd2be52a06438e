"""The G diagnostic on small models: exact against directional, parts, blocks, and what a step really does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_po import losses, stats_loss, token_stats
from fused_po.diagnostics import (
    Examples,
    GradientAlignmentCallback,
    by_layer,
    gradient_alignment,
    learning_dynamics,
)
from tests.losses.cases import CASES, create, side_inputs

V, H, S = 13, 8, 6


class Policy(nn.Module):
    """Not a transformer: an embedding, a layer and a head, read position by position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V)
        self.frozen = nn.Parameter(torch.ones(H), requires_grad=False)
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(self.embed(tokens))) * self.frozen)


def stats_of(model, inputs, labels, outputs):
    return token_stats(model(inputs["tokens"]), labels, outputs=tuple(outputs))


def examples(loss: losses.Loss | None, seed: int, count: int = 6) -> Examples:
    torch.manual_seed(seed)
    tokens, labels = torch.randint(0, V, (count, S)), torch.randint(0, V, (count, S))
    labels[torch.rand(labels.shape) < 0.2] = -100
    labels[:, 0] = 1
    if loss is None:
        return Examples({"tokens": tokens}, labels)
    with torch.no_grad():
        logp = stats_of(Policy(), {"tokens": tokens}, labels, ("logp",)).logp
    return Examples({"tokens": tokens}, labels, side_inputs(loss, labels, logp))


def align(loss: losses.Loss, **options):
    return gradient_alignment(
        Policy(), [examples(loss, 1), examples(loss, 2)], loss, [examples(None, 3)], stats=stats_of, **options
    )


@pytest.mark.parametrize("case", CASES)
def test_directional_equals_exact_and_parts_sum(case):
    loss = create(case)
    exact, fast = align(loss, method="exact"), align(loss)
    scale = max(abs(exact[part]) for part in exact.values)
    for part in exact.values:
        assert abs(fast[part] - exact[part]) <= 0.01 * abs(exact[part]) + 1e-6 * scale
    for found in (exact, fast):
        for suffix in ("", "/no_reweighting"):
            g = {part: found[part + suffix] for part in ("whole", "positive", "negative", "rest")}
            assert g["positive"] + g["negative"] + g["rest"] == pytest.approx(g["whole"], abs=1e-9 * (1 + scale))
            thirds = sum(found[part + suffix] for part in ("top", "middle", "bottom", "rest"))
            assert thirds == pytest.approx(g["whole"], abs=1e-9 * (1 + scale))
    assert scale > 0 or case == "sigmoid-zero-beta"


@pytest.mark.parametrize("method", ["exact", "directional"])
def test_blocks_sum_to_the_whole(method):
    loss = create("dapo-all")
    whole = align(loss, method=method)
    blocks = align(loss, method=method, blocks=by_layer)
    assert set(blocks.values["whole"]) == {"embed", "layer", "head"}
    for part in whole.values:
        assert blocks[part] == pytest.approx(whole[part], rel=1e-6, abs=1e-10)


def nll(model, target: Examples, reduction: str) -> torch.Tensor:
    logp = stats_of(model, target.inputs, target.labels, ("logp",)).logp
    kept = torch.where(target.labels >= 0, logp, 0.0)
    return -kept.sum() / ((target.labels >= 0).sum() if reduction == "token" else len(target.labels))


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("case", ["sigmoid", "ppo-all", "kto", "orpo"])
def test_a_small_step_changes_the_nll_as_g_says(case, reduction):
    """NLL(theta - eta grad L) - NLL(theta) = -eta G within 2 %."""
    loss, model = create(case), Policy()
    data, target = examples(loss, 1), examples(None, 3)
    g = gradient_alignment(model, [data], loss, [target], reduction=reduction, stats=stats_of)["whole"]
    trained = [p for p in model.parameters() if p.requires_grad]

    found = stats_of(model, data.inputs, data.labels, loss.statistics)
    gradients = torch.autograd.grad(stats_loss(found, data.labels, loss, **data.side_inputs).loss, trained)
    before, eta = nll(model, target, reduction).item(), 1e-4
    with torch.no_grad():
        for parameter, grad in zip(trained, gradients, strict=True):
            parameter -= eta * grad
    assert nll(model, target, reduction).item() - before == pytest.approx(-eta * g, rel=0.02)


def test_the_model_is_left_as_it_was():
    model, loss = Policy(), create("sigmoid")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for method in ("exact", "directional"):
        gradient_alignment(model, [examples(loss, 1)], loss, [examples(None, 3)], method=method, stats=stats_of)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_causal_language_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes)).eval()
    loss, tokens = losses.create("sigmoid"), torch.randint(0, 31, (4, 7))
    data = Examples({"input_ids": tokens}, tokens[:, 1:], {"ref_logp": torch.full((4,), -20.0)})
    target = Examples({"input_ids": tokens.flip(1)}, tokens.flip(1)[:, 1:])
    exact = gradient_alignment(model, [data], loss, [target], method="exact", blocks=by_layer)
    fast = gradient_alignment(model, [data], loss, [target], blocks=by_layer)
    assert {"layers.0", "layers.1", "embed_tokens", "lm_head", "norm"} == set(exact.values["whole"])
    for part in ("whole", "positive", "negative"):
        assert fast[part] == pytest.approx(exact[part], rel=0.01)
    other = Examples({"input_ids": tokens + 20}, (tokens + 20)[:, 1:])
    with pytest.raises(ValueError, match="D' does not fit the model .another tokenizer"):
        gradient_alignment(model, [data], loss, [other])


def test_bad_input():
    loss, data, target = create("sigmoid"), examples(create("sigmoid"), 1), examples(None, 3)
    empty = Examples(target.inputs, torch.full_like(target.labels, -100))
    call = gradient_alignment
    with pytest.raises(ValueError, match=r"target \(D'\) holds no loss token"):
        call(Policy(), [data], loss, [empty], stats=stats_of)
    with pytest.raises(ValueError, match=r"target \(D'\) holds no loss token"):
        call(Policy(), [data], loss, [], stats=stats_of)
    with pytest.raises(ValueError, match=r"batches \(D\) holds no loss token"):
        call(Policy(), [], loss, [target], stats=stats_of)
    with pytest.raises(ValueError, match="method must be one of exact, directional"):
        call(Policy(), [data], loss, [target], method="fast", stats=stats_of)
    with pytest.raises(ValueError, match="reduction must be one of"):
        call(Policy(), [data], loss, [target], reduction="mean", stats=stats_of)
    with pytest.raises(ValueError, match="directional needs parameters of 32 bits"):
        call(Policy().bfloat16(), [data], loss, [target], stats=stats_of)
    with pytest.raises(ValueError, match="step must be above 0"):
        call(Policy(), [data], loss, [target], step=0.0, stats=stats_of)
    with pytest.raises(ValueError, match="requires a gradient"):
        call(Policy().requires_grad_(False), [data], loss, [target], stats=stats_of)
    with pytest.raises(ValueError, match="needs ref_logp"):
        call(Policy(), [target], loss, [target], stats=stats_of)
    with pytest.raises(
        ValueError, match="blocks must be a function .*by_layer .the function, not its name.: got 'by_l"
    ):
        call(Policy(), [data], loss, [target], blocks="by_layer", stats=stats_of)


@pytest.mark.parametrize("which", ["batches", "target"])
def test_what_is_no_list_of_examples(which):
    loss, data, target = create("sigmoid"), examples(create("sigmoid"), 1), examples(None, 3)
    name = {"batches": r"batches \(D\)", "target": r"target \(D'\)"}[which]
    one = {"batches": data, "target": target}[which]
    bare_tuple = [(one.inputs, one.labels, one.side_inputs)]
    for given, words in (
        (one, r"must be a list of Examples: got one Examples, write \[examples\]"),
        (bare_tuple, "must hold Examples, .*: got tuple"),
        # it would be used up by the first look
        (iter([one]), "must be a list of Examples: got list_iterator"),
        (None, "must be a list of Examples: got NoneType"),
    ):
        found = {"batches": [data], "target": [target]} | {which: given}
        with pytest.raises(ValueError, match=f"{name} {words}"):
            gradient_alignment(Policy(), found["batches"], loss, found["target"], stats=stats_of)
        if which == "batches":
            with pytest.raises(ValueError, match=f"{name} {words}"):
                learning_dynamics(Policy(), given, loss, stats=stats_of)
        with pytest.raises(ValueError, match=f"{name} {words}"):
            GradientAlignmentCallback(found["batches"], loss, found["target"])


def test_side_inputs_as_keywords():
    target = examples(None, 3)
    with pytest.raises(
        TypeError, match=r'in one mapping, Examples\(inputs, labels, \{"ref_logp": \.\.\.\}\): got ref_logp'
    ):
        Examples(target.inputs, target.labels, ref_logp=torch.zeros(6))
    assert Examples(inputs=target.inputs, labels=target.labels).side_inputs == {}


def test_a_name_that_is_not_there():
    g = align(create("sigmoid"), blocks=by_layer)
    with pytest.raises(KeyError, match="no part 'positiv' .did you mean positive..: there is bottom, .*, whole"):
        g["positiv"]
    with pytest.raises(KeyError, match=r"'layer' is a block and not a part: values\[PART\]\['layer'\]"):
        g["layer"]
    with pytest.raises(KeyError, match=r"no block 'layer\.1' .did you mean layer..: there is embed, head, layer"):
        g.values["whole"]["layer.1"]
    with pytest.raises(ValueError, match="G has no part 'positiv' .did you mean positive"):
        GradientAlignmentCallback(
            [examples(create("sigmoid"), 1)], create("sigmoid"), [examples(None, 3)], parts=["positiv"]
        )
