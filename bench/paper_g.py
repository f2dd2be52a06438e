"""What G of a pretrained model takes on one GPU, on paper: counted on tensors without values.

python -m bench.paper_g    # writes bench/results/paper/g.json, which a test compares with
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from fused_po import losses
from fused_po.diagnostics import Examples, predict_alignment

__all__ = ["BATCHES", "METHODS", "MODELS", "RECORDED", "TOKENS", "count", "read"]

RECORDED = Path(__file__).parent / "results" / "paper" / "g.json"
MODELS = {
    "Qwen3-1.7B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
}
METHODS = ("directional", "exact")
# answers at once; D may hold any number of such batches
BATCHES = (8,)
# of prompt and answer
TOKENS = 512


def count(name: str, method: str, answers: int) -> dict[str, int]:
    """Bytes of float32 tensors at the peak of G with its cosine, of DPO, and of the model among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).eval()
    ids = torch.zeros(answers, TOKENS, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = [Examples(inputs, ids[:, 1:], {"ref_logp": torch.zeros(answers)})]
    found = predict_alignment(model, given, losses.create("sigmoid"), given, method=method, cosine=True)
    return {"peak": found.peak, "model": found.model}


def read() -> dict[str, Any]:
    """What was recorded: model -> method -> answers at once -> bytes."""
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def main() -> None:
    found = {
        name: {method: {str(answers): count(name, method, answers) for answers in BATCHES} for method in METHODS}
        for name in MODELS
    }
    RECORDED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
