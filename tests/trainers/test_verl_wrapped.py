"""The forward for verl inside DDP, FSDP and FSDP2: hooks fire, and the mean over ranks is that of the whole batch."""

from __future__ import annotations

import warnings

import torch
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fused_po.trainers.deferred import DeferredLogits
from fused_po.trainers.verl import forward_with_fused_po, policy_loss
from tests.forked import on_ranks
from tests.test_distributed import RANKS

V, S = 39, 7


class Actor(LlamaForCausalLM):
    forward = forward_with_fused_po


def make(kind, tied):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=V, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return kind(config).double()


def batch():
    torch.manual_seed(1)
    ids, mask = torch.randint(0, V, (RANKS, S)), torch.arange(S) < torch.tensor([6, 3, 5])[:, None]
    old, advantage = (torch.randn(RANKS, S, dtype=torch.float64) for _ in range(2))
    return ids, mask, old - 3.5, advantage


def on_rank(rank):
    for wrapper in ("ddp", "fsdp2"):
        for tied in (False, True):
            check(rank, wrapper, tied)


def check(rank, wrapper, tied):
    ids, mask, old, advantage = batch()
    whole = make(LlamaForCausalLM, tied)
    logp = whole(ids).logits.log_softmax(-1).gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    fn = policy_loss("vanilla")
    fn(old, logp, advantage, mask)[0].backward()

    model = make(Actor, tied)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    mine = slice(rank, rank + 1)
    out = model(input_ids=ids[mine], return_dict=True)
    info = {"dp_size": RANKS, "batch_num_tokens": int(mask.sum())}
    loss = fn(old[mine], out.log_probs, advantage[mine], mask[mine], "token-mean", {"global_batch_info": info})[0]
    loss.backward()
    inner = model.module if wrapper == "ddp" else model
    for found, want in zip(inner.parameters(), whole.parameters(), strict=True):
        gradient = found.grad.full_tensor() if isinstance(found.grad, DTensor) else found.grad
        assert want.grad.abs().max() > 0
        # the norms of the model compute in float32
        assert (gradient - want.grad).norm() <= 1e-6 * want.grad.norm(), (wrapper, tied)


def on_rank_of_fsdp(rank):
    """FSDP's first version, as verl wraps a model: its layers, and what is left around them."""
    warnings.filterwarnings("error", message=".*logits")
    ids, mask, old, advantage = batch()
    for tied in (False, True):
        whole, fn = make(LlamaForCausalLM, tied), policy_loss("vanilla")
        logp = whole(ids).logits.log_softmax(-1).gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
        fn(old, logp, advantage, mask)[0].backward()
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        model = FullyShardedDataParallel(make(Actor, tied), auto_wrap_policy=policy, device_id=torch.device("cpu"))
        products = []
        model.lm_head.register_forward_hook(lambda _, __, found, seen=products: seen.append(found))
        mine = slice(rank, rank + 1)
        out = model(input_ids=ids[mine], return_dict=True)
        torch.testing.assert_close(out.log_probs, logp[mine])
        settings = {"global_batch_info": {"dp_size": RANKS, "batch_num_tokens": int(mask.sum())}}
        fn(old[mine], out.log_probs, advantage[mine], mask[mine], "token-mean", settings)[0].backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        # but for some rows of the check
        assert [type(found) for found in products] == [DeferredLogits, torch.Tensor, DeferredLogits]
        start = make(LlamaForCausalLM, tied)
        with FullyShardedDataParallel.summon_full_params(model):
            for found, before, want in zip(
                model.module.parameters(), start.parameters(), whole.parameters(), strict=True
            ):
                assert want.grad.abs().max() > 0
                # the norms of the model compute in float32
                assert (before - found - want.grad).norm() <= 1e-6 * want.grad.norm(), tied


def test_the_first_version_of_fsdp(tmp_path):
    on_ranks(on_rank_of_fsdp, RANKS, tmp_path)


def test_gradients_are_those_of_the_whole_batch(tmp_path):
    on_ranks(on_rank, RANKS, tmp_path)
