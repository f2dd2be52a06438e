"""Hidden states and head of a causal language model from transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.ops import linear_token_stats
from fused_po.stats import Stats

__all__ = ["HeadParameters", "base_and_head", "hidden_and_head", "token_stats_of"]


SOFTCAP = "final_logit_softcapping"


@dataclass(frozen=True)
class HeadParameters:
    """A model's head, in the terms of ``linear_loss``.

    Attributes:
        weight: (V, H), tied to the embeddings or not.
        bias: (V,) or None.
        softcap: ``final_logit_softcapping`` of the config (Gemma 2).
        logit_scale: what multiplies the raw logits (Cohere, Granite, Falcon-H1), 1.0 for most models.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight, as keyword arguments of the operations."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits from hidden states (..., H): (..., V)."""
        raw = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def hidden_and_head(model: nn.Module) -> tuple[Callable[..., Tensor], HeadParameters]:
    """Split a causal language model in two.

    ::

        backbone, head = hidden_and_head(model)
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask)   # (B, S, H)
        out = linear_loss(hidden[:, :-1], head.weight, labels, loss, **head.options)

    Args:
        model: a causal LM from transformers, wrapped by PEFT or not; vision-language models too, whose backbone takes
            the images.

    Returns:
        ``backbone``, which takes what the model takes and returns the last hidden state (B, S, H), and the head.

    Raises:
        ValueError: as ``base_and_head``.
    """
    base, head = base_and_head(model)

    def backbone(**inputs: Any) -> Tensor:
        found = base.base_model(**inputs, use_cache=False, return_dict=True)
        hidden: Tensor = found.last_hidden_state
        return hidden

    return backbone, head


def base_and_head(model: nn.Module) -> tuple[Any, HeadParameters]:
    """The model without its PEFT wrapper, whose ``base_model`` is everything but the head, and the head.

    A softcap or logit scale counts where the class of the model reads it: the config of a text model inside a
    vision-language model may name one that the outer model leaves out (Gemma 3, Cohere 2 Vision).

    Raises:
        ValueError: a model without an output layer, an encoder-decoder, a head of several layers (BERT), an adapter on
            the head (its weight is not the layer's alone), or one that adds tokens (prompt tuning).
    """
    prompted = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if layer is None or base.config.is_encoder_decoder:
        what = "is an encoder-decoder" if layer is not None else "has no output layer"
        raise ValueError(f"{type(base).__name__} {what}: a causal language model is wanted")
    if prompted:
        raise ValueError("the adapter adds tokens (prompt learning): its hidden states are not those of the inputs")
    if hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save"):
        raise ValueError("the head carries an adapter: take lm_head out of target_modules and modules_to_save")
    # BERT's kin have a layer and a norm in front of it
    between = [one for one in base.children() if "Prediction" in type(one).__name__]
    if between or not any(one is layer for one in base.children()):
        raise ValueError(f"the head of {type(base).__name__} is more than one linear layer")
    config = base.config.get_text_config()
    kind: Any = type(base)
    softcap = getattr(config, SOFTCAP, None) if _reads(kind, SOFTCAP) else None
    return base, HeadParameters(layer.weight, getattr(layer, "bias", None), softcap, _logit_scale(kind, config))


def token_stats_of(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, outputs: Sequence[str] = ("logp",)
) -> Stats:
    """Statistics of labels under a causal language model, differentiable, without its logits.

    Args:
        model: as in ``hidden_and_head``.
        inputs: what the model takes, (B, S).
        labels: (B, S - 1), already shifted, -100 ignored.
        outputs: names of statistics.
    """
    backbone, head = hidden_and_head(model)
    hidden = backbone(**inputs)[:, :-1]  # (B, S - 1, H)
    return linear_token_stats(hidden, head.weight, labels, outputs=tuple(outputs), **head.options)


def _logit_scale(kind: Any, config: Any) -> float:
    """Models name it differently; Granite and MiniCPM3 divide by theirs, HyperCLOVA X multiplies by one of the same
    name.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None and _reads(kind, name):
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None or not _reads(kind, "logits_scaling"):
        return 1.0
    return float(scaling) if "hyperclova" in config.model_type else 1.0 / float(scaling)


@cache
def _reads(kind: Any, name: str) -> bool:
    """Whether the source of a model's class, or of one above it, names a setting; yes where there is no source.

    The source and not the function ``forward``, which trainers replace.
    """
    try:
        return any(name in inspect.getsource(one) for one in kind.__mro__ if issubclass(one, nn.Module))
    except (OSError, TypeError):
        return True
