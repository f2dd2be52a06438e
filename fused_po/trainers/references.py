"""What the reference policy says of rows of preferences: asked once, shared by ranks, and cached by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn

import fused_po
from fused_po.ops.checks import IGNORE
from fused_po.trainers.batches import collate, mismatched
from fused_po.trainers.data import mapped

__all__ = ["COLUMNS", "keep_reference", "with_reference"]

# of load_preferences
COLUMNS = ("ids", "starts", "signs", "tokens")


def keep_reference(
    rows: Sequence[dict[str, Any]], pad: int, log_probs: Callable[[dict[str, Tensor], str], Tensor]
) -> None:
    """Put the log-probs of each answer's tokens into its row, ``ref``, and those of mismatched answers, ``other_ref``.

    Args:
        rows: of one batch.
        log_probs: of a batch of ``collate`` and the prefix of its names, (B, S - 1).
    """
    for prefix in ("", "other_") if "other_ids" in rows[0] else ("",):
        batch = collate(rows, pad, prefix)
        logp, kept = log_probs(batch, prefix).float().cpu(), batch[f"{prefix}labels"] != IGNORE
        answers = [one[mask].tolist() for one, mask in zip(logp, kept, strict=True)]
        for index, row in enumerate(rows):
            row[f"{prefix}ref"] = answers[index :: len(rows)]


def with_reference(trainer: Any, model: nn.Module, rows: Any, places: Sequence[int], pad: int) -> Any:
    """The rows at some places, with a model's log-prob of each answer's tokens (``ref``).

    For KTO also each prompt with the answers of the next of all rows that asks something else (``other_ids``,
    ``other_starts``, ``other_ref``), which does not depend on the places.
    """
    args, mismatch = trainer.args, "kl" in trainer.loss.needs
    key = [_content(model), rows._fingerprint, args.bf16, args.fp16, mismatch]

    def said(columns: Mapping[str, Sequence[Any]], at: Sequence[int]) -> dict[str, list[Any]]:
        trainer.reference_rows += len(at)
        part = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if mismatch:
            part = [row | mismatched(rows, place) for row, place in zip(part, at, strict=True)]
        keep_reference(part, pad, lambda *batch: trainer.log_probs(model, trainer._prepare_inputs(batch[0]), batch[1]))
        return {name: [row[name] for row in part] for name in part[0]}

    training, place = model.training, next(model.parameters()).device
    model.to(args.device).eval()
    pieces, count = {}, args.world_size
    # each rank makes its own piece, then reads those of the others from the cache
    for rank in sorted(range(count), key=lambda rank: rank != args.process_index):
        own = list(places[len(places) * rank // count : len(places) * (rank + 1) // count])
        pieces[rank] = mapped(
            rows.select(own),
            lambda columns, at, own=own: said(columns, [own[index] for index in at]),
            [*key, own],
            batch_size=args.train_batch_size,
            desc="reference",
        )
        if rank == args.process_index:
            trainer.accelerator.wait_for_everyone()
    model.to(place).train(training)
    return datasets.concatenate_datasets([pieces[rank] for rank in range(count) if len(pieces[rank])])


def _content(model: nn.Module) -> str:
    """A digest of what a model computes: its classes, config, adapters and weights, and by which versions."""
    versions = [fused_po.__version__, torch.__version__, transformers.__version__]
    digest = hashlib.sha256(f"{model}{getattr(model, 'config', '')}{versions}".encode())
    for name, module in model.named_modules():
        # an adapter's scale and whether it is on are neither in the config nor in the weights
        adapter = [getattr(module, one, None) for one in ("scaling", "active_adapters", "merged_adapters")]
        digest.update(f"{name}{adapter}{getattr(module, 'disable_adapters', None)}".encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
