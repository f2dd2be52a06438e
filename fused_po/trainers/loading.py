"""The model and tokenizer that a run starts from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fused_po.trainers.rows import shortened

__all__ = ["add_adapter", "device_of", "load_model", "load_tokenizer"]

TINY_VOCAB = 8192
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def device_of(name: str | None) -> torch.device:
    """A device by its name; None: a GPU if there is one.

    Raises:
        ValueError: it is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    # what torch says of a missing GPU is an AssertionError
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).strip().splitlines()[0]}") from None


def load_tokenizer(name: str, texts: Iterable[str]) -> Any:
    """A tokenizer by folder or id; for ``tiny``, byte-level BPE trained on the texts.

    Raises:
        ValueError: not found.
    """
    from transformers import AutoTokenizer

    if name == "tiny":
        return _train_tokenizer(texts)
    # it can only be a folder
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        raise ValueError(f"--model {name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # what readers of a broken file raise has no common base
        raise ValueError(f"no tokenizer for {_named(name)}: {_said(error)}") from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, tokenizer: Any, seed: int) -> Any:
    """A causal language model in float32, with the adapter that a folder holds merged into it; for ``tiny``, a random
    Llama of 6 million parameters.

    Raises:
        ValueError: not found.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if name != "tiny":
        try:
            if (Path(name) / "adapter_config.json").is_file():
                from peft import AutoPeftModelForCausalLM

                return AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32).merge_and_unload()
            return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except Exception as error:
            raise ValueError(f"no model for {_named(name)}: {_said(error)}") from None
    config = LlamaConfig(
        # as real heads, a multiple of a power of two with unused rows behind the tokens
        vocab_size=TINY_VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def add_adapter(model: Any, rank: int, seed: int) -> Any:
    """Wrap a model with a LoRA adapter on all linear layers but the head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _train_tokenizer(texts: Iterable[str]) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, TINY_VOCAB, min_frequency=0, show_progress=False, special_tokens=_SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = _TEMPLATE
    return fast


def _named(name: str) -> str:
    return repr(name) if Path(name).exists() else f"{name!r}, which is no folder here"


def _said(error: Exception) -> str:
    return shortened(error if isinstance(error, OSError | ValueError) else repr(error), 300)
