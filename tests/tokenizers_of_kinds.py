"""Small tokenizers of the kinds that models come with, trained on what the tests read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fused_po.trainers.loading import load_tokenizer

KINDS = ("bytes", "metaspace", "wordpiece", "ends")

# as some real templates: strips contents, and leaves out an empty thought that its generation prompt ends with
STRIPPING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think></think>{% endif %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)


def tokenizer_of(kind: str, texts: Sequence[str]) -> Any:
    """One of ``KINDS``: byte-level BPE; Metaspace with a beginning token, as Llama 2's; WordPiece between [CLS] and
    [SEP] with an end token beside these; the same where [SEP] is the end token, so that the tokenizer adds it itself.
    """
    if kind == "bytes":
        return load_tokenizer("tiny", texts)
    if kind == "metaspace":
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace()
        special = ["<unk>", "<s>", "</s>"]
        inner.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        )
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]"]
    inner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    end = "[SEP]" if kind == "ends" else "[END]"
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token=end)
