"""Models inside DDP and FSDP2: gradients of three processes are the mean of those of the bare model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fused_po import linear_token_stats, take_apart
from fused_po.trainers.seam import deferred
from tests.forked import on_ranks
from tests.test_distributed import RANKS

V, S, STEPS = 39, 7, 2


def make(*, tied: bool = False, bias: bool = False, unused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, num_key_value_heads=2, tie_word_embeddings=tied, **sizes))
    if bias:
        model.lm_head = nn.Linear(12, V)
    if unused:
        model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    return model.double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(0, V, (RANKS, S)), torch.randn(RANKS, S - 1, dtype=torch.float64)


def truth(model: nn.Module) -> list[Tensor | None]:
    """Of the mean over ranks, each of which has one row."""
    ids, weights = batch()
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ((weights * logp).sum() / RANKS).backward()
    return [parameter.grad for parameter in model.parameters()]


def by_take_apart(model: nn.Module, ids: Tensor) -> Tensor:
    hidden, head, _ = take_apart(model, input_ids=ids)
    return linear_token_stats(hidden[:, :-1], head.weight, ids[:, 1:], **head.options).logp


def by_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """As trainers do that ask for logits."""
    with deferred(model) as calls:
        logits = model(input_ids=ids, use_cache=False).logits
        found = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert len(calls) == 1 and not calls[0].unknown
    return found


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def fsdp2(model, *, head=False, reshard=None, **options):
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    layers = [*model.model.layers, *([model.lm_head] if head else [])]
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)


# what the model is made with, and what it is put into
CASES = {
    "ddp": ({}, ddp, {}),
    "ddp, static graph": ({}, ddp, {"static_graph": True}),
    "ddp, static graph, tied": ({"tied": True}, ddp, {"static_graph": True}),
    "ddp, unused parameters": ({"unused": True, "bias": True}, ddp, {"find_unused_parameters": True}),
    "ddp, gradients are views": ({}, ddp, {"gradient_as_bucket_view": True}),
    "fsdp2": ({"tied": True}, fsdp2, {}),
    "fsdp2, the head a unit": ({"bias": True}, fsdp2, {"head": True}),
    "fsdp2, the root sharded again": ({}, fsdp2, {"reshard": True}),
    "fsdp2, tied, the root sharded again": ({"tied": True}, fsdp2, {"reshard": True}),
}


def on_rank(rank: int) -> None:
    ids, weights = batch()
    mine = slice(rank, rank + 1)
    for name, (settings, wrap, options) in CASES.items():
        want = truth(make(**settings))
        for way in (by_take_apart, by_logits):
            model = make(**settings)
            wrapped = wrap(model, **options)
            for _ in range(STEPS):
                wrapped.zero_grad()
                (weights[mine] * way(wrapped, ids[mine])).sum().backward()
            for parameter, wanted in zip(model.parameters(), want, strict=True):
                found = parameter.grad
                found = found.full_tensor() if isinstance(found, DTensor) else found
                if wanted is None:
                    assert found is None or not found.any()
                    continue
                assert found is not None and wanted.abs().max() > 0, (name, way.__name__)
                # the norms of the model compute in float32
                apart = (found - wanted).norm() / wanted.norm()
                assert apart <= 1e-6, (name, way.__name__, apart)


def test_gradients_are_those_of_the_bare_model(tmp_path):
    on_ranks(on_rank, RANKS, tmp_path)


def halves_on_rank(rank: int) -> None:
    """Weights that FSDP2 casts: the head is gathered in the dtype that it was used in."""
    ids, _ = batch()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped = fsdp2(make().float(), head=True, mp_policy=policy)
    hidden, head, _ = take_apart(wrapped, input_ids=ids[rank : rank + 1])
    assert hidden.dtype == head.weight.dtype == torch.bfloat16 and not isinstance(head.weight, DTensor)
    linear_token_stats(hidden[:, :-1], head.weight, ids[rank : rank + 1, 1:], **head.options).logp.sum().backward()
    gradient = wrapped.lm_head.weight.grad
    assert gradient.dtype == torch.float32 and gradient.full_tensor().abs().max() > 0


def test_a_head_that_fsdp_casts(tmp_path):
    on_ranks(halves_on_rank, RANKS, tmp_path)
