"""What a study of a pretrained model will take, on paper: from its config and the shapes of a step, before it runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fused_po.diagnostics import Examples
from fused_po.diagnostics.paper import fused_attention, predict_alignment
from fused_po.ledger import record
from fused_po.ops import linear_loss
from fused_po.prices import Device
from fused_po.study.real_settings import RealSettings
from fused_po.study.real_train import loss_of

__all__ = ["GIB", "Needs", "needs"]

GIB = 1 << 30
# bytes of a trained parameter's state, by optimizer; a paged one's may leave the device, and counts as if it did not
STATE = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": 2.1, "paged_adamw_8bit": 2.1, "sgd": 0.0}
# of torch, the driver and fragments
BESIDE = 2 * GIB
SINGLE, HALF = 4, 2


@dataclass(frozen=True)
class Needs:
    """Bytes and seconds of a study, by what it does.

    Attributes:
        parameters: of the model, and ``trained`` ones.
        memory: phase -> what is held at its peak -> bytes.
        update: method -> seconds of an update on the device that was asked for; None without one.
        disk: bytes of the checkpoints of one measured run.
    """

    parameters: int
    trained: int
    memory: Mapping[str, Mapping[str, int]]
    update: Mapping[str, float] | None
    disk: int

    @property
    def peak(self) -> int:
        """The largest phase, in bytes."""
        return max(sum(phase.values()) for phase in self.memory.values())

    def hours(self, settings: RealSettings, methods: Mapping[str, int]) -> float:
        """Of the updates of so many runs of each method, without what is measured."""
        assert self.update is not None
        return settings.steps * sum(runs * self.update[method] for method, runs in methods.items()) / 3600


def needs(settings: RealSettings, config: Any, on: Device | None = None, methods: tuple[str, ...] = ("dpo",)) -> Needs:
    """The needs of a study on one GPU.

    A step of the model runs on tensors that have shapes and no values; what it keeps is counted, operation by
    operation. Weights are float32 and layers run in bfloat16 (autocast), which keeps a copy of the weights.

    Args:
        config: of the model, from transformers.
        on: prices time, if given.
        methods: ``dpo``, ``grpo``.

    Raises:
        ValueError: an optimizer whose state is not known.
    """
    if settings.optim not in STATE:
        raise ValueError(f"what {settings.optim} keeps is not known: {', '.join(STATE)} are")
    model, sizes = _model(settings, config)
    parameters = sum(one.numel() for one in model.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    half = settings.dtype != "float32"
    weights, state = SINGLE * parameters, round(STATE[settings.optim] * trained)
    held = {"weights": weights, "optimizer": state}
    copies = {"weights in bfloat16": HALF * parameters} if half else {}
    memory: dict[str, dict[str, int]] = {}
    update: dict[str, float] = {}
    for method in methods:
        peak, seconds = _step(model, settings, method, on)
        width = HALF if half else SINGLE
        activations = max(0, peak - width * trained)
        memory[f"{method} update"] = {
            **held,
            **copies,
            "gradients": SINGLE * trained,
            "activations and logits": activations,
            "torch, driver and fragments": BESIDE,
        }
        update[method] = settings.batch / settings.micro_batch * seconds
        if method == "grpo":
            cache = _cache(sizes, settings, settings.batch)
            memory["rollout"] = {
                **held,
                **copies,
                "cache of keys and values": cache,
                "torch, driver and fragments": BESIDE,
            }
            if on is not None:
                # each token reads all weights, writes them in bfloat16 and reads that
                read = (weights + 2 * HALF * parameters if half else weights) + cache
                update[method] += settings.max_new_tokens * on.moved(read) / settings.iterations
    answers = 16
    memory["measuring"] = {
        "weights": weights,
        "weights of the start": weights,
        "weights in bfloat16": HALF * parameters if half else 0,
        "cache of keys and values": _cache(sizes, settings, answers),
        "torch, driver and fragments": BESIDE,
    }
    memory["G"] = {
        "weights": weights,
        "gradients, activations and logits": _alignment(model, settings),
        "torch, driver and fragments": BESIDE,
    }
    disk = SINGLE * trained * (settings.checkpoints - 1) + state
    return Needs(parameters, trained, memory, update if on is not None else None, disk)


def _model(settings: RealSettings, config: Any) -> tuple[Any, Any]:
    """The model without values, and what says how large its cache is."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    # a model writes its attention into its config
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if settings.lora is not None:
            from fused_po.trainers.loading import add_adapter

            model = add_adapter(model, settings.lora, 0)
    return model, config.get_text_config()


def _step(model: Any, settings: RealSettings, method: str, on: Device | None) -> tuple[int, float]:
    """The peak of a forward and backward of one batch beyond the weights, in bytes, and its seconds."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if settings.gradient_checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.lora is not None:
            inner.enable_input_require_grads()
    inner.train()
    rows, device = settings.micro_batch, torch.device("meta")
    ids = torch.empty(rows, settings.max_length, dtype=torch.int64, device=device)
    side: dict[str, Any] = {"ref_logp": torch.empty(rows, device=device)}
    if method != "dpo":
        side = {"advantage": torch.empty(rows, device=device), "old_logp": torch.empty(ids[:, 1:].shape, device=device)}
    with record() as ledger, fused_attention():
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weight = inner.get_output_embeddings().weight
        linear_loss(hidden[:, :-1], weight, ids[:, 1:], loss_of(method, settings), **side).loss.backward()
    model.zero_grad()
    return ledger.peak, 0.0 if on is None else ledger.seconds(on)


def _alignment(model: Any, settings: RealSettings) -> int:
    """The peak of G beyond the weights, in bytes: in float32, and without gradient checkpointing."""
    model.float().eval()
    if settings.gradient_checkpointing:
        (model.get_base_model() if hasattr(model, "get_base_model") else model).gradient_checkpointing_disable()
    ids = torch.empty(settings.micro_batch, settings.max_length, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "attention_mask": ids}
    given = Examples(inputs, ids[:, 1:], {"ref_logp": torch.empty(settings.micro_batch, device="meta")})
    loss, device = loss_of("dpo", settings), settings.device or "cuda"
    options: dict[str, Any] = {"method": settings.estimator, "cosine": True}
    return predict_alignment(model, [given], loss, [given], device=device, **options).above


def _cache(config: Any, settings: RealSettings, rows: int) -> int:
    """Bytes of keys and values of so many answers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = HALF if settings.dtype != "float32" else SINGLE
    return 2 * width * config.num_hidden_layers * heads * size * rows * settings.max_length
