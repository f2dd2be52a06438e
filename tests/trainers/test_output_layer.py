"""Which heads can hand on deferred logits."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.seam import deferred, output_layer

IDS = torch.arange(8).view(2, 4)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))


def test_it_is_that_of_the_outermost_model_that_names_one():
    model = tiny()
    assert output_layer(nn.ModuleDict({"inner": nn.Sequential(model)})) == (model, model.lm_head)
    with pytest.raises(ValueError, match="Linear has no output layer"):
        output_layer(nn.Linear(2, 2))


@pytest.mark.parametrize("odd", ["hook", "forward of its own", "compiled", "nothing"])
def test_heads_that_wait(odd):
    """Whatever stands around the product is called as ever."""
    model: Any = tiny()
    layer, seen = model.lm_head, []
    if odd == "hook":
        layer.register_forward_pre_hook(lambda _, args: (2.0 * args[0],))
        layer.register_forward_hook(lambda _, args, logits: seen.append(logits) or logits / 2.0)
    elif odd == "forward of its own":
        own = layer.forward
        layer.forward = lambda hidden: seen.append(hidden) or own(3.0 * hidden)
    elif odd == "compiled":
        layer.compile(backend="eager")
    want = model(IDS).logits
    before = dict(vars(layer))
    seen.clear()
    with deferred(model) as calls, deferred(model):
        found = model(IDS).logits
    assert isinstance(found, DeferredLogits) and found.now is None
    torch.testing.assert_close(found.made(), want)
    assert vars(layer) == before and len(calls) == 1 and len(seen) == (odd in ("hook", "forward of its own"))


def test_heads_that_make_their_logits():
    model = tiny()
    with pytest.warns(UserWarning, match="full logits are made: DataParallel"), deferred(nn.DataParallel(model)):
        assert type(model(IDS).logits) is torch.Tensor
    with deferred(nn.Linear(2, 2)) as calls:
        pass
    assert calls == []


@pytest.mark.parametrize("what", ["whole", "body"])
def test_compiled_models_stay_compiled(what):
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model: Any = tiny()
    want = model(IDS).logits
    compiled = model
    if what == "whole":
        compiled = torch.compile(model, backend=backend)
    else:
        model.model = torch.compile(model.model, backend=backend)
    counts = []
    for i in range(24):
        if i % 3 < 2:
            with deferred(compiled):
                found = compiled(IDS).logits
            assert isinstance(found, DeferredLogits)
            torch.testing.assert_close(found.made(), want)
        else:
            torch.testing.assert_close(compiled(IDS).logits, want)
        counts.append(len(graphs))
    # once within a seam and once without, for all of the others
    assert 0 < counts[2] == counts[-1]


def test_another_thread_is_not_within_the_seam():
    model = tiny()
    want = model(IDS).logits
    inside, left = threading.Barrier(2, timeout=60), threading.Event()
    found: dict[str, Any] = {}

    def other() -> None:
        inside.wait()
        found["plain"] = model(IDS).logits
        with deferred(model):
            inside.wait()
            left.wait(60)
            found["own"] = model(IDS).logits
        found["after"] = model(IDS).logits

    thread = threading.Thread(target=other)
    thread.start()
    with deferred(model):
        inside.wait()
        inside.wait()
        assert isinstance(model(IDS).logits, DeferredLogits)
    # the other one is still within its own
    assert type(model(IDS).logits) is torch.Tensor
    left.set()
    thread.join()
    assert type(found["plain"]) is torch.Tensor and type(found["after"]) is torch.Tensor
    assert isinstance(found["own"], DeferredLogits) and "forward" not in vars(model.lm_head)
    torch.testing.assert_close(found["own"].made(), want)


def test_errors_of_the_body_are_its_own():
    with pytest.raises(KeyError) as caught, deferred(nn.Linear(2, 2)):
        raise KeyError("body")
    assert caught.value.__context__ is None
    model = tiny()
    with pytest.raises(KeyError), deferred(model):
        raise KeyError("body")
    assert "forward" not in vars(model.lm_head)


def test_a_layer_is_let_go():
    model = tiny()
    with deferred(model):
        model(IDS)
    layer = weakref.ref(model.lm_head)
    del model
    gc.collect()
    assert layer() is None
