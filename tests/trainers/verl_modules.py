"""Modules shaped like those of verl 0.9: the names that ``fused_po.trainers.verl`` replaces or calls, and their users.

Only shapes: what a function here computes is a mark that it was called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

KERNEL = "verl.utils.kernel.linear_cross_entropy"
TORCH = "verl.utils.experimental.torch_functional"
DENSE = "verl.models.transformers.dense_common"
MEGATRON = "verl.models.mcore.model_forward_fused"
CORE = "verl.trainer.ppo.core_algos"
PATCH = "verl.models.transformers.monkey_patch"

SOURCES = {
    KERNEL: """
import torch
class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        return "verl's log-probs", "verl's entropy"
linear_cross_entropy = LinearCrossEntropy.apply
""",
    TORCH: """
import torch
class FusedLinearForPPO(torch.nn.Module):
    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        return "verl's log-probs", "verl's entropy"
""",
    # as in verl: names of the two above are looked up in each call, and the head's weight is all that is read of it
    DENSE: """
import torch
def forward_with_torch_backend(self, input_ids=None, attention_mask=None, temperature=1.0, shift_labels=None, **kwargs):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
    labels = torch.roll(input_ids, shifts=-1, dims=-1) if shift_labels is None else shift_labels
    fused = FusedLinearForPPO(impl_backend=getattr(self, "_verl_fused_kernels_backend", "torch"))
    return fused.forward(
        hidden_states=hidden, vocab_weights=self.lm_head.weight, input_ids=labels, temperature=temperature
    )
def forward_with_triton_backend(self, input_ids=None, attention_mask=None, temperature=1.0, **kwargs):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
    labels = torch.roll(input_ids, shifts=-1, dims=-1)
    return linear_cross_entropy(hidden, self.lm_head.weight, labels, temperature, "none")
""",
    # Megatron's path imports the name when it is loaded
    MEGATRON: """
from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
def fused_output_processor(hidden_states, weight, labels, temperature, group):
    return linear_cross_entropy(hidden_states, weight, labels, temperature, "none", group)
""",
    # as in verl: the class of the model gets the forward that the module has by then
    PATCH: """
def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
    from verl.models.transformers.dense_common import forward_with_torch_backend, forward_with_triton_backend
    triton = fused_kernels_backend == "triton"
    model.__class__.forward = forward_with_triton_backend if triton else forward_with_torch_backend
""",
    CORE: """
POLICY_LOSS_REGISTRY = {}
def register_policy_loss(name):
    def decorator(func):
        POLICY_LOSS_REGISTRY[name] = func
        return func
    return decorator
def get_policy_loss_fn(name):
    return POLICY_LOSS_REGISTRY[name]
""",
}


@contextmanager
def installed(without: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The modules by name, in ``sys.modules`` for a while; those of ``without`` are left out."""
    names = {name.rsplit(".", depth)[0] for name in SOURCES for depth in range(name.count(".") + 1)}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "verl"}
    for name in before:
        del sys.modules[name]
    made: dict[str, Any] = {}
    try:
        for name in sorted(names - set(without), key=lambda name: (name == MEGATRON, name)):
            module = made[name] = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            sys.modules[name] = module
        for name in (KERNEL, TORCH, DENSE, MEGATRON, PATCH, CORE):
            if name in made:
                exec(SOURCES[name], made[name].__dict__)
        yield made
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
            del sys.modules[name]
        sys.modules.update(before)
