"""Models for ``fused-po g``: what they will take, what they take, and activations that are made again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_po.cli.g_data import Data
from fused_po.cli.profile_report import memory_words
from fused_po.diagnostics import Examples, peak_memory
from fused_po.diagnostics.checkpoints import config_of
from fused_po.diagnostics.gradients import trained
from fused_po.diagnostics.paper import predict_alignment
from fused_po.diagnostics.parts import independent
from fused_po.losses import Loss
from fused_po.trainers.loading import device_of
from fused_po.trainers.model import token_stats_of

__all__ = ["checkpointed", "counted", "forecast", "predicted", "require_model"]


def checkpointed(model: Any) -> Any:
    """The model with its activations made again in the backward, in eval mode all the same.

    Raises:
        ValueError: a model that can't.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"--gradient-checkpointing: {type(model).__name__} has none")
    # a newer name of the same
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        # it asks whether it is in training; what is in it, dropout, stays as it is
        layer.training = True
    return model


def predicted(
    folder: Path, data: Data, target: Sequence[Examples], options: Mapping[str, Any], arguments: argparse.Namespace
) -> tuple[int, str]:
    """Bytes at the peak, and words about it."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, arguments.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(folder), dtype=dtype)
    if arguments.lora_only:
        model = _with_adapter(model, folder)
    model = model.eval()
    model = checkpointed(model) if arguments.gradient_checkpointing else model
    on = device_of(arguments.device)
    found = predict_alignment(model, data.shapes(), data.loss, target, device=on.type, **options)
    text = f"memory at the peak: {memory_words(found.peak)} of tensors, {memory_words(found.model)} of them the model"
    if on.type == "cuda":
        free = torch.cuda.mem_get_info(on)[0]
        text += f"; {memory_words(free)} are free"
        if found.peak > free:
            raise ValueError(f"{text}: a smaller --batch-size or --gradient-checkpointing takes less")
    return found.peak, text


def _with_adapter(model: nn.Module, folder: Path) -> Any:
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    with torch.device("meta"):
        return get_peft_model(model, config)


def counted(call: Callable[[], Any], model: nn.Module, count: bool) -> tuple[Any, int]:
    """What a call returns, and the peak of tensors in it, the model included; 0 where it is not counted."""
    if not count:
        return call(), 0
    kept: list[Any] = []
    device = next(model.parameters()).device
    above = peak_memory(lambda: kept.append(call()), device)
    held = [*model.parameters(), *model.buffers()]
    return kept[0], above + sum(one.numel() * one.element_size() for one in held)


def forecast(
    model: nn.Module, batches: Sequence[Examples], target: Sequence[Examples], loss: Loss, options: Mapping[str, Any]
) -> float:
    """Seconds that G at a checkpoint will take, from one forward and how many passes there are; a backward is two."""
    # the first time is slower
    for _ in range(2):
        start = time.monotonic()
        with torch.no_grad():
            token_stats_of(model, batches[0].inputs, batches[0].labels, loss.statistics)
            if batches[0].labels.is_cuda:
                torch.cuda.synchronize()
    one = (time.monotonic() - start) / batches[0].labels.numel()
    tokens, others = (sum(batch.labels.numel() for batch in given) for given in (batches, target))
    measured = {part for counts in independent(tuple(options["parts"])).values() for part in counts}
    if options["method"] == "exact":
        passes = 2 + 2 * len(measured)
    else:
        blocks = {options["blocks"](name) for name in trained(model)} if options["blocks"] else {"all"}
        # three steps from both sides, and the whole loss by its gradient
        passes = 2 + 6 * len(blocks) + 3
    return one * (passes * tokens + 3 * others)


def require_model(name: str, vocabulary: int) -> None:
    """Raise ValueError for a reference that can't be read, or has fewer tokens than the checkpoints."""
    try:
        own = config_of(name).get_text_config().vocab_size
    except ValueError as error:
        raise ValueError(f"--reference: no model for {name!r}: {error}") from None
    if own < vocabulary:
        raise ValueError(f"--reference has {own} tokens, the checkpoints {vocabulary}: another tokenizer's")
