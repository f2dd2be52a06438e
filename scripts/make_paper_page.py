"""Write the table of docs/paper.md: what the study of two known models takes, from the shapes of a step.

python -m scripts.make_paper_page
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_po.prices import device
from fused_po.study.real_memory import GIB, needs
from fused_po.study.real_settings import RealSettings, arms_of

__all__ = ["MODELS", "PAGE", "table"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "paper.md"
BEGIN, END = "<!-- written by python -m scripts.make_paper_page -->\n", "<!-- end of what it writes -->\n"
# of one GPU of 80 GB
GPU = "h100"
# sizes as their configs on the hub have them
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-1.7B": (
        "qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "max_position_embeddings": 40_960,
        },
    ),
    "Pythia-2.8B": (
        "gpt_neox",
        {
            "vocab_size": 50_304,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
}
# of the study, beside its defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "`--optim paged_adamw_8bit`": {"optim": "paged_adamw_8bit"},
    "`--lora 16`": {"lora": 16},
}


def table() -> str:
    """The table as Markdown."""
    from transformers import AutoConfig

    on, rows, phases = device(GPU), [], []
    methods = ("dpo", "grpo")
    for name, (kind, sizes) in MODELS.items():
        config = AutoConfig.for_model(kind, **sizes)
        for words, options in VARIANTS.items():
            settings = RealSettings(name, "pairs.jsonl", dtype="bfloat16", **options)
            found = needs(settings, config, on, methods)
            phases = list(found.memory)
            cells = [f"{sum(found.memory[phase].values()) / GIB:.0f}" for phase in phases]
            seconds = [f"{found.update[method]:.1f} s" for method in methods] if found.update else []
            hours = found.hours(settings, {method: len(arms_of(method)) for method in methods})
            rows.append([name, words, *cells, *seconds, f"{hours:.1f} h", f"{found.disk / GIB:.0f} GiB"])
    header = ["model", "", *phases, *(f"update of {method.upper()}" for method in methods), "updates of a seed", "disk"]
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
