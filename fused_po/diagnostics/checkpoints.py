"""G over saved checkpoints: all of them are checked before the first one is loaded."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_po.diagnostics.alignment import Alignment, gradient_alignment
from fused_po.diagnostics.examples import Examples, require_examples, require_loss_tokens
from fused_po.losses.contract import Loss

__all__ = ["alignment_over_checkpoints", "check_checkpoints", "config_of"]

Batches = Sequence[Examples] | Callable[[nn.Module, Path], Sequence[Examples]]


def alignment_over_checkpoints(
    checkpoints: Sequence[str | Path],
    batches: Batches,
    loss: Loss,
    target: Sequence[Examples],
    *,
    tokenizer: Any = None,
    load: Callable[[Path], nn.Module] | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> dict[Path, Alignment]:
    """G at each checkpoint of a run, in eval mode: ``gradient_alignment``, which says what D and D' are.

    Args:
        checkpoints: folders that ``save_pretrained`` wrote, in the order of training.
        batches: D; or a function of the model and its folder, for a D that moves with the policy (PPO's rollouts).
        loss: from ``fused_po.losses.create``.
        target: D'.
        options: of ``gradient_alignment``.
        tokenizer: what D and D' were encoded with; compared with the tokenizers beside the checkpoints. None: only
            labels beyond the vocabulary are noticed.
        load: from a folder to its model; default a causal language model of transformers, in float32.
        device: where the models and the target go; "cpu".

    Returns:
        by folder.

    Raises:
        ValueError: before anything is loaded, whatever ``check_checkpoints`` finds, an empty D', and what is no list of
            ``Examples``.
    """
    folders = [Path(folder) for folder in checkpoints]
    vocab_size = check_checkpoints(folders, tokenizer)
    require_loss_tokens("target (D')", target)
    labels = [examples.labels for examples in target]
    largest = max(int(one.max()) for one in labels)
    if largest >= vocab_size:
        raise ValueError(f"target (D') holds token {largest}, the model has {vocab_size}: another tokenizer's?")
    if not callable(batches):
        require_examples("batches (D)", batches)
        for examples in batches:
            loss.check(frozenset(examples.side_inputs))
    moved = [examples.to(device) for examples in target]
    found = {}
    for folder in folders:
        model = (load or _load)(folder).to(device).eval()
        given = batches(model, folder) if callable(batches) else batches
        require_examples("batches (D)", given)
        found[folder] = gradient_alignment(model, [one.to(device) for one in given], loss, moved, **options)
    return found


def check_checkpoints(checkpoints: Sequence[str | Path], tokenizer: Any = None) -> int:
    """Whether folders hold checkpoints of one model, without loading them.

    Args:
        checkpoints: folders that ``save_pretrained`` wrote, of models or of adapters.
        tokenizer: compared with those saved beside the models; None: these are compared with each other.

    Returns:
        the size of the model's vocabulary.

    Raises:
        ValueError: none given, a folder that is missing or holds no weights, weights whose names or shapes differ from
            the first one's, tokenizers that differ.
    """
    if not checkpoints:
        raise ValueError("no checkpoint given")
    folders = [Path(folder) for folder in checkpoints]
    first = _shapes(folders[0])
    for folder in folders[1:]:
        shapes = _shapes(folder)
        for name in sorted(first.keys() ^ shapes.keys()):
            raise ValueError(f"{folder} is no checkpoint of the model in {folders[0]}: only one of them has {name}")
        for name, shape in shapes.items():
            if shape != first[name]:
                raise ValueError(
                    f"{folder} is no checkpoint of the model in {folders[0]}: {name} is {shape}, there {first[name]}"
                )
    _check_tokenizers(folders, tokenizer)
    return int(config_of(folders[0]).get_text_config().vocab_size)


def config_of(folder: str | Path) -> Any:
    """The config of a checkpoint, or of a hub id; of an adapter in a folder, that of its base model.

    Raises:
        ValueError: it can't be read.
    """
    from transformers import AutoConfig

    with _readable(folder):
        adapter = Path(folder) / "adapter_config.json"
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter.is_file() else ""
        return AutoConfig.from_pretrained(base or folder)


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    """What a broken file of a folder raises within, which has no common base, as ValueError that names the folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder} can't be read: {textwrap.shorten(repr(error), 300)}") from None


def _shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Of the weights in a folder, by name, from the heads of their files."""
    from safetensors import safe_open

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: a folder that save_pretrained wrote is wanted")
    pattern = "adapter_model*.safetensors" if adapter else "model*.safetensors"
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob(pattern)):
        with _readable(file), safe_open(file, framework="pt") as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    if not found:
        raise ValueError(f"{folder} holds no {pattern}")
    return found


def _check_tokenizers(folders: Sequence[Path], tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    wanted, whose = (None, "") if tokenizer is None else (tokenizer.get_vocab(), "the given one")
    for folder in folders:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            continue
        with _readable(folder):
            vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        if wanted is None:
            wanted, whose = vocabulary, f"that of {folder}"
        if vocabulary != wanted:
            raise ValueError(f"the tokenizer of {folder} is another than {whose}")


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model
