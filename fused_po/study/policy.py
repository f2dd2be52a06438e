"""The policy: a small model with one token per character, and sampling from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_po.study.task import ALPHABET, Prompt
from fused_po.trainers.answers import answers_to
from fused_po.trainers.batches import AnswerBatch, pad_answers
from fused_po.trainers.model import token_stats_of

__all__ = ["Language", "Sample", "new_model", "sample", "tiny_tokenizer", "token_logp"]

_PAD, _END = "<|pad|>", "<|end|>"


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt.

    Attributes:
        prompt: what was asked.
        ids: token ids of the answer, the end of the sequence included where it was reached.
        text: the answer.
    """

    prompt: Prompt
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Language:
    """Prompts and answers in the tokens of a model."""

    tokenizer: Any
    # the few prompts of the task are asked for all the time
    _prompts: dict[Prompt, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prompt(self, prompt: Prompt) -> list[int]:
        """Its token ids."""
        if prompt not in self._prompts:
            self._prompts[prompt] = self.tokenizer(prompt.text)["input_ids"]
        return self._prompts[prompt]

    def answer(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def pad(self, samples: Sequence[Sample], device: torch.device) -> AnswerBatch:
        rows = [(self.prompt(one.prompt), one.ids) for one in samples]
        return pad_answers(rows, self.tokenizer.pad_token_id).to(device)

    def written(self, prompt: Prompt, text: str) -> Sample:
        """The sample that a text is."""
        return Sample(prompt, self.answer(text), text)


def tiny_tokenizer() -> Any:
    """One token per character of the task."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate((_PAD, _END, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_PAD)


def new_model(tokenizer: Any, hidden_size: int, layers: int, seed: int) -> Any:
    """A random Llama for the task's own tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden_size // 32),
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def sample(
    model: Any, language: Language, prompts: Sequence[Prompt], max_tokens: int, greedy: bool = False
) -> list[Sample]:
    """An answer to each prompt, drawn at temperature 1, or of the likeliest tokens."""
    rows = [language.prompt(prompt) for prompt in prompts]
    drawn = answers_to(model, rows, language.tokenizer, max_tokens, sampled=not greedy)
    texts = (language.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in drawn)
    return [Sample(*one) for one in zip(prompts, drawn, texts, strict=True)]


def token_logp(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Log-probs of the answers' tokens, (B, S - 1), 0 elsewhere."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logp = token_stats_of(model, inputs, batch.labels).logp
    assert logp is not None
    return logp
