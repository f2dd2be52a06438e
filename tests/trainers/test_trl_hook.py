"""``enable`` and ``disable``: what is replaced, what is put back, and that our function is the one that is called."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import transformers

pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
import trl.trainer.utils as utils
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.kernels import ChunkedLogProbFunction

from fused_po import Split, splits
from fused_po.trainers import trl as hooks
from fused_po.trainers.trl import FusedDPOTrainer, hook, one_pass
from tests.trainers.trl_runs import PAIRS, TIMES, TOKENIZER, assert_same, perturbed, run, tiny

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _restored():
    yield
    hooks.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_enable_and_disable():
    assert not hooks.is_enabled() and hooks.calls() == 0
    hooks.enable()
    hooks.enable(scratch_bytes=1 << 20)
    assert hooks.is_enabled() and utils._ChunkedLogProbFunction.options["scratch_bytes"] == 1 << 20
    hooks.disable()
    hooks.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with hooks.enable():
        assert hooks.is_enabled()
    assert not hooks.is_enabled()


def test_importing_changes_nothing():
    code = (
        "import trl.trainer.utils as u; before = u._ChunkedLogProbFunction; import fused_po.trainers.trl;"
        "from fused_po.trainers.trl import FusedDPOTrainer; assert u._ChunkedLogProbFunction is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_trl_one_sentence_says_so():
    code = (
        "import sys\nclass Hidden:\n    def find_spec(self, name, path=None, target=None):\n        return None\n"
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'trl' else found(name, *a)\n"
        "try:\n    import fused_po.trainers.trl\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(
        "fused_po.trainers.trl needs TRL, which is not installed: pip install 'trl>=1.15', or '.[trl]'"
    )


def scaled(factor: float):
    """linear_token_stats whose gradient is a little too large."""
    original = hook.linear_token_stats

    def wrong(*args, **kwargs):
        found = original(*args, **kwargs)
        return replace(found, logp=factor * found.logp + (1 - factor) * found.logp.detach())

    return wrong


def test_a_wrong_gradient_is_noticed(monkeypatch, tmp_path):
    """What the runs compare would fail if ours were off by a thousandth."""
    theirs = run("dpo", DPOTrainer, tmp_path)
    monkeypatch.setattr(hook, "linear_token_stats", scaled(1.001))
    ours = run("dpo", DPOTrainer, tmp_path, enable=True)
    with pytest.raises(AssertionError, match="step 0: grad_norm"):
        assert_same(ours, theirs)
    original = one_pass._Connect.backward
    monkeypatch.setattr(one_pass._Connect, "backward", lambda ctx, g: original(ctx, 1.001 * g))
    with pytest.raises(AssertionError, match="step 0: grad_norm"):
        assert_same(run("dpo", FusedDPOTrainer, tmp_path), theirs)


def test_a_split_changes_the_gradient_and_not_the_loss(tmp_path):
    class PositiveOnly(FusedDPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, split=splits.positive_only(), **kwargs)

    class Whole(FusedDPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, split=Split(), **kwargs)

    theirs = run("dpo", DPOTrainer, tmp_path)
    assert_same(run("dpo", Whole, tmp_path), theirs)
    half = run("dpo", PositiveOnly, tmp_path)
    assert half[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert abs(half[0]["grad_norm"] - theirs[0]["grad_norm"]) > 0.05 * theirs[0]["grad_norm"]


def test_evaluation_gives_the_same_numbers(tmp_path):
    found = []
    for trainer in (DPOTrainer, FusedDPOTrainer):
        config = DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=4, beta=0.3
        )
        rows = Dataset.from_list(PAIRS)
        made = trainer(
            model=tiny(),
            ref_model=perturbed(tiny()),
            args=config,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=TOKENIZER,
        )
        found.append({k: v for k, v in made.evaluate().items() if not any(word in k for word in TIMES)})
    theirs, ours = found
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert theirs["eval_loss"] > 0.1


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "Llama": {"attention_bias": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "Gemma3Text": {"tie_word_embeddings": True},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def build(name: str, seed: int = 0, vocab: int = 89, **options) -> nn.Module:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**({} if name == "GPT2" else SIZES), **ids, **MODELS[name], **options}
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab, **settings)
    torch.manual_seed(seed)
    name = "Gemma3" if name == "Gemma3Text" else "GPT2LMHead" if name == "GPT2" else name
    kind = "GPT2LMHeadModel" if name == "GPT2LMHead" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_through_the_head(name, autocast):
    """Every output and every gradient of TRL's fused head, on real classes; in bfloat16 ours are the nearer ones."""
    model = build(name)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=OUTPUTS)
    ids = torch.randint(3, 89, (3, 7))
    labels = ids.clone()
    labels[:, :2] = -100
    found = []
    for ours in (False, True):
        with hooks.enable() if ours else nullcontext(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
            (out.log_probs.sum() + 0.1 * out.entropy.sum() + (0.0 if out.aux_loss is None else out.aux_loss)).backward()
            assert (hooks.calls() == 1) == ours
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((out, gradients))
    (theirs, their_gradients), (mine, my_gradients) = found
    close = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for field in OUTPUTS[:-1]:
        torch.testing.assert_close(getattr(mine, field), getattr(theirs, field), **close)
    assert (theirs.aux_loss is None) == (name != "Mixtral")
    assert their_gradients.keys() == my_gradients.keys()
    for parameter, grad in their_gradients.items():
        bound = (5e-2 if autocast else 1e-4) * grad.norm() + 1e-6
        assert (my_gradients[parameter] - grad).norm() <= bound, parameter


def test_a_batch_without_labels_keeps_the_graph():
    model = tiny()
    utils.add_fused_lm_head(model, outputs=OUTPUTS)
    ids = torch.randint(5, 20, (2, 6))
    with hooks.enable():
        out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        out.log_probs.sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_no_rows_at_all():
    """As on a GPU, where TRL drops rows without a label."""
    hooks.enable()
    hidden = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    found = utils._ChunkedLogProbFunction.apply(hidden, weight, None, empty, 1.0, 32768, None, 1.0, OUTPUTS)
    assert all(value.shape == (0,) for value in found)
    found[0].sum().backward()
    assert (weight.grad == 0).all()


# the second: as many tokens as sequences, which are not one each
@pytest.mark.parametrize("kept", [[4, 4, 4, 4], [2, 0, 2, 0]])
def test_compacted_rows_in_one_pass(kept):
    """TRL hands only rows with a label on where Triton runs; the sequences are put together again."""
    from fused_po import linear_loss, losses

    torch.manual_seed(0)
    hidden = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (4, 6))
    labels[torch.arange(6) < 6 - torch.tensor(kept).unsqueeze(1)] = -100
    keep = labels >= 0
    loss = losses.create("dapo", beta=0.1)
    side = {"advantage": torch.randn(4), "ref_logp": torch.randn(4, 6), "old_logp": torch.randn(4, 6)}
    want = linear_loss(hidden, weight, labels, loss, **side)
    gradients = torch.autograd.grad(want.loss, (hidden, weight))
    call = one_pass.OnePass(loss, labels, side)
    found = call(hidden[keep], weight, labels[keep], ("logp", "entropy"))
    torch.testing.assert_close(found.logp, want.stats.logp[keep])
    got = torch.autograd.grad(one_pass._Connect.apply(torch.zeros(()), found.logp), (hidden, weight))
    for mine, truth in zip(got, gradients, strict=True):
        torch.testing.assert_close(mine, truth)
    with pytest.raises(ValueError, match="adapters that add tokens to the prompt"):
        call(hidden[keep][:3], weight, labels[keep][:3], ("logp",))


def test_a_sharded_head_is_gathered_again_in_backward(monkeypatch):
    """ZeRO-3: outside of its contexts the weight is empty."""
    weight = nn.Parameter(torch.randn(11, 8))
    whole, entered = weight.data, []

    @contextmanager
    def gathered(*parameters):
        assert parameters[0] is weight
        entered.append(len(entered))
        weight.data = whole
        yield
        weight.data = whole.new_empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    hidden = torch.randn(5, 8, requires_grad=True)
    targets = torch.randint(0, 11, (5,))
    want = torch.autograd.grad(torch.log_softmax(hidden @ whole.t(), -1).gather(1, targets[:, None]).sum(), hidden)[0]
    hooks.enable(scratch_bytes=0)
    with utils.maybe_gather_lm_head_ctx(weight, None):
        logp = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
    weight.data = whole.new_empty(0)
    got = torch.autograd.grad(logp.sum(), hidden)[0]
    torch.testing.assert_close(got, want)
    assert len(entered) == 2
