"""Answers of a model: the likeliest tokens, or its own distribution, whatever its generation config says."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from fused_po.trainers.answers import answers_to
from fused_po.trainers.loading import load_tokenizer

TOKENIZER = load_tokenizer("tiny", ["Is it red? Yes, it is."])
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, eos_token_id=3, pad_token_id=0, bos_token_id=None, **sizes))


def test_greedy_answers_are_the_likeliest_tokens() -> None:
    policy = model().train()
    policy.generation_config = GenerationConfig(repetition_penalty=3.0, eos_token_id=[3, 4], pad_token_id=0)
    found = answers_to(policy, PROMPTS, TOKENIZER, 6, sampled=False)
    assert policy.training
    policy.eval()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and ids[len(prompt) :][-1:] != [TOKENIZER.eos_token_id]:
            ids.append(int(policy(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


def test_samples_are_of_the_models_own_distribution() -> None:
    policy = model()
    torch.manual_seed(1)
    want = answers_to(policy, PROMPTS, TOKENIZER, 6, sampled=True)
    policy.generation_config = GenerationConfig(do_sample=True, temperature=0.1, top_k=1, repetition_penalty=2.0)
    torch.manual_seed(1)
    assert answers_to(policy, PROMPTS, TOKENIZER, 6, sampled=True) == want
    torch.manual_seed(2)
    assert answers_to(policy, PROMPTS, TOKENIZER, 6, sampled=True) != want
