"""A pretrained model in a study: loaded with or without an adapter, asked, and its answers as examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_po.diagnostics import Examples
from fused_po.trainers import loading
from fused_po.trainers.answers import answers_to
from fused_po.trainers.batches import pad_answers
from fused_po.trainers.data import renderer

__all__ = ["Answer", "Speaker", "answers", "autocast", "examples_of", "load"]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        prompt: as it stands in the data, a string or messages.
        prompt_ids: its tokens.
        ids: tokens of the answer, the end included where it was reached.
        text: the answer.
        row: the row of the data.
    """

    prompt: Any
    prompt_ids: list[int]
    ids: list[int]
    text: str
    row: Mapping[str, Any]

    @property
    def said(self) -> Any:
        """As answers stand in the data: a string, or a message in a list."""
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class Speaker:
    """How prompts are written in a model's tokens, and answers drawn: by the rule of ``load_preferences``.

    Attributes:
        tokenizer: of the model.
        max_prompt: tokens of a prompt; longer ones are cut on the left.
        max_new_tokens: of an answer.
        rows: prompts that are answered at once.
    """

    tokenizer: Any
    max_prompt: int
    max_new_tokens: int
    rows: int = 16

    def encode(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of the prompt of a row of the data."""
        prompt = row["prompt"]
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
            # a tokenizer may end what it encodes; the answer comes behind that
            ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        else:
            text = renderer(self.tokenizer, row)(prompt, add_generation_prompt=True)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[-self.max_prompt :]


def load(start: str, folder: Path | None, lora: int | None, seed: int, tokenizer: Any) -> Any:
    """The start of a study, or a checkpoint of it, in float32, with the parameters trainable that training changes.

    Args:
        start: a folder or hub id.
        folder: of the checkpoint; None: the start.
        lora: rank of the adapter, or None: all parameters are trained.
        seed: of a new adapter.
    """
    if lora is None:
        return loading.load_model(start if folder is None else str(folder), tokenizer, seed)
    model = loading.load_model(start, tokenizer, seed)
    if folder is None:
        return loading.add_adapter(model, lora, seed)
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    """What a model runs in, as in its training."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def answers(
    model: Any, speaker: Speaker, rows: Sequence[Mapping[str, Any]], *, sampled: bool = True, seed: int = 0
) -> list[Answer]:
    """An answer to the prompt of each row, at temperature 1 or greedily. The global generator is left as it was."""
    tokenizer, found = speaker.tokenizer, []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in _parts(rows, speaker.rows):
            encoded = [speaker.encode(row) for row in part]
            drawn = answers_to(model, encoded, tokenizer, speaker.max_new_tokens, sampled=sampled)
            for row, asked, said in zip(part, encoded, drawn, strict=True):
                text = tokenizer.decode(said, skip_special_tokens=True)
                found.append(Answer(row["prompt"], asked, said, text, row))
    return found


def examples_of(
    rows: Sequence[tuple[list[int], list[int]]], pad: int, side_inputs: Mapping[str, Any] | None = None
) -> Examples:
    """Prompts with an answer each, token ids, as a batch."""
    batch = pad_answers(rows, pad)
    return Examples({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}, batch.labels, side_inputs)


def _parts(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
