"""Answers of a language model to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["answers_to"]


@torch.no_grad()
def answers_to(
    model: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, longest: int, *, sampled: bool
) -> list[list[int]]:
    """Token ids of an answer to each prompt, all drawn at once, in eval mode; the end token counts where it is reached.

    Args:
        prompts: token ids.
        longest: tokens of an answer.
        sampled: from the model's own distribution, at temperature 1; else the likeliest token each time. What the
            model's generation config says of either (temperature, penalties, cuts of the distribution) does not count.
    """
    device, end = next(model.parameters()).device, tokenizer.eos_token_id
    pad, width = tokenizer.pad_token_id or 0, max(map(len, prompts))
    # on the left, so that all answers begin in the same column
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    how = {**(how if sampled else {"do_sample": False}), "num_beams": 1, "repetition_penalty": 1.0}
    ends = {"pad_token_id": pad, "eos_token_id": end, "max_new_tokens": longest}
    training = model.training
    model.eval()
    drawn = model.generate(input_ids=ids, attention_mask=mask, **how, **ends)[:, width:].tolist()
    model.train(training)
    return [row[: row.index(end) + 1] if end in row else row for row in drawn]
