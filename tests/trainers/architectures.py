"""Every causal architecture of the installed transformers, as small as its configuration lets it be."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

NAMES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCAB, LENGTH = 96, 8

# by the names that configurations give to sizes; what a configuration does not know is left out
LAYERS = dict.fromkeys(
    (
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_blocks"),
        *("num_encoder_layers", "num_decoder_layers"),
    ),
    2,
)
HEADS = dict.fromkeys(
    (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_key_value_heads"),
        *("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "kv_n_heads"),
    ),
    4,
)
WIDTHS = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "emb_dim", "embedding_size"), 64)
INNER = dict.fromkeys(
    (
        *("intermediate_size", "n_inner", "dim_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "d_inner"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "ffn_hidden_size_mlp"),
        *("moe_shared_expert_intermediate_size", "feed_forward_size", "attention_hidden_size", "lru_width"),
    ),
    64,
)
OTHERS = {
    **dict.fromkeys(("vocab_size", "n_tokens"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    "head_dim": 16,
    "kv_channels": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k"), 2),
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "sliding_window": 4,
    "attention_window_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "unk_token_id": 0,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
TINY = LAYERS | HEADS | WIDTHS | INNER | OTHERS


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Keyword arguments of a small configuration of the same kind."""
    given: dict[str, Any] = {}
    known = set(config.to_dict()) | set(inspect.signature(type(config).__init__).parameters)
    for name in sorted(known):
        try:
            value = getattr(config, name, None)
        # one that may differ from layer to layer
        except Exception:
            value = None
        if isinstance(value, PretrainedConfig):
            try:
                given[name] = type(value)(**shrunk(value))
            # as it is
            except Exception:
                continue
        elif name in TINY and not isinstance(value, (list, tuple, dict)):
            given[name] = TINY[name]
    return given


def build(name: str) -> nn.Module:
    """A model with random weights, float32, in eval mode, with logits of some tens.

    Raises:
        Exception: the configuration can't be made small in this way.
    """
    base = AutoConfig.for_model(name)
    given = shrunk(base) | copy.deepcopy(SPECIAL.get(name, {}))
    config = type(base)(**given)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind.config_class is not type(config) and isinstance(config.get_text_config(), kind.config_class):
        config = config.get_text_config()
    if hasattr(config, "is_decoder") and not config.is_decoder:
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"{name} has {size} parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    layer = model.get_output_embeddings()
    if layer is not None:
        # some thousandths at first, which no softcap would be seen in
        with torch.no_grad():
            layer.weight.mul_(40.0 / logits_of(model).abs().max())
    return model


def adapted(model: nn.Module) -> nn.Module:
    """The same model with a LoRA adapter that is heard, on the projections that PEFT takes.

    Raises:
        ValueError: there is none that it takes.
    """
    layers = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, (nn.Linear, Conv1D))}
    targets = sorted(layers & set(PROJECTIONS))
    if not targets:
        raise ValueError(f"{type(model).__name__} has no projection of {', '.join(PROJECTIONS)}")
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(5, 60, (2, LENGTH))}


def logits_of(model: nn.Module, **inputs: Any) -> Tensor:
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    found = model(**(inputs or inputs_of(model)), **({"use_cache": False} if "use_cache" in known else {}))
    return found.logits if hasattr(found, "logits") else found[0]


# attention, and what stands in its place
PROJECTIONS = (
    *("q_proj", "v_proj", "query_key_value", "c_attn", "query", "value", "Wqkv", "in_proj", "qkv_proj", "o_proj", "q"),
    *("wq", "wv", "q_lin", "v_lin", "x_proj", "receptance", "kv_b_proj", "in_proj_qkv", "fc1", "att_proj", "q_a_proj"),
    *(
        "project_q",
        "query_proj",
        "Wq",
        "kv_proj",
        "kv_linear",
        "qkv",
        "proj_up",
        "down_proj",
        "up_proj",
        "wq_b",
        "gate_proj",
    ),
)
HYBRID = {"num_hidden_layers": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"rotary_dim": 8} for name in ("codegen", "gptj")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (2, 4), "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "mimo_v2_flash": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), HYBRID),
}
