"""``PreferenceTrainer``: transformers' ``Trainer`` on any of our losses."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from fused_po.losses import Loss
from fused_po.losses.batch import OPTIONAL, SIDE_INPUTS
from fused_po.ops import LossOutput, linear_loss, linear_token_stats
from fused_po.ops.checks import IGNORE
from fused_po.splits import Split, check_split
from fused_po.trainers.averages import Averages, weighed_metrics
from fused_po.trainers.batches import collate
from fused_po.trainers.model import take_apart
from fused_po.trainers.references import COLUMNS, with_reference
from fused_po.trainers.whole import writing

__all__ = ["PreferenceTrainer", "check_trainable", "learns_single", "reads_reference", "side_inputs_of", "trained"]

# what answers with signs and a reference make
_KNOWN = frozenset({"ref_logp", "old_logp", "advantage", "desirable", "kl"})
_OF_REFERENCE = frozenset({"ref_logp", "old_logp", "kl"})
_INPUTS = ("input_ids", "attention_mask")


def learns_single(loss: Loss) -> bool:
    """Whether a loss learns answers one by one; else it takes pairs."""
    return all(part.needs & {"desirable", "advantage"} for _, part in loss.parts)


def check_trainable(loss: Loss) -> None:
    """Whether preferences hold all that a loss reads.

    Raises:
        ValueError: they do not.
    """
    missing = (loss.needs & SIDE_INPUTS) - OPTIONAL - _KNOWN
    if missing:
        raise ValueError(f"loss {loss.name!r} can't be trained from pairs: it needs {', '.join(sorted(missing))}")


def reads_reference(loss: Loss) -> bool:
    """Whether a reference model has to be asked."""
    return bool(loss.needs & _OF_REFERENCE)


def side_inputs_of(loss: Loss, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a loss reads of a batch of ``collate`` beside statistics, but for KTO's reference point: the reference is
    the old policy too, and answers have an advantage of +1 or -1.
    """
    side = {"advantage": batch["signs"].float(), "desirable": batch["signs"] > 0}
    side |= {name: batch["ref_logp"] for name in ("ref_logp", "old_logp") if "ref_logp" in batch}
    return {name: value for name, value in side.items() if name in loss.needs}


class PreferenceTrainer(Trainer):
    """transformers' ``Trainer`` on a loss of ours: everything but the loss is the engine's.

    Normalisers count the loss tokens and answers of all ranks and accumulation steps. Metrics are averaged over steps
    and ranks by the tokens or answers that they are means of. Checkpoints are written aside and renamed, so that an
    interrupted one is never taken for a whole one.

    Args:
        model: a causal language model, wrapped by PEFT or not.
        args: of the engine.
        train_dataset, eval_dataset: ``load_preferences(...).rows``; of the training rows only those that ``max_steps``
            will reach get reference log-probs. Other columns are not read.
        loss: from ``fused_po.losses.create``. Losses on single answers take the answers of a pair as desirable and
            undesirable, policy losses as advantages of +1 and -1 with the reference as the old policy. KTO's reference
            point is the mean log-ratio of each prompt with the answers of the next row that asks something else.
        split: scales positive and negative learning; schedules run over ``max_steps``.
        reference: the reference policy; None: ``model`` as it is now. It is asked once, before training, and what it
            says is cached by its weights and the rows. A loss that reads no reference asks none.
        options: of ``Trainer``.

    Attributes:
        reference_rows: how many rows this process asked the reference for; the others came from the cache.

    Raises:
        ValueError: a loss that preferences can't train, rows or a split that do not suit it, no parameter to train,
            several GPUs in one process, an argument that only the engine's own loss reads.
    """

    # of transformers 5; older ones ask model_accepts_loss_kwargs
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        loss: Loss,
        split: Split | None = None,
        reference: nn.Module | None = None,
        **options: Any,
    ) -> None:
        check_trainable(loss)
        check_split(None if split is None else split.at(0.0), loss)
        if args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not read: take the loss 'conservative' or 'robust'")
        if not trained(model):
            raise ValueError("no parameter of the model is trained: all are frozen")
        self.loss, self.split, self._reference = loss, split, reference
        self.reference_rows = 0
        self._train, self._eval, self._steps = Averages(), Averages(), 0
        self._eval_totals: Tensor | None = None
        self._prepared_ones: list[Any] = []
        self._aside, self._ordered = False, False
        self._pad: int = getattr(options.get("processing_class"), "pad_token_id", None) or 0
        options = {"data_collator": lambda rows: collate(rows, self._pad), **options}
        # accelerate rebuilds the sampler by data_seed alone, or else by torch's global seed
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        self.model_accepts_loss_kwargs = True
        self._signature_columns: Any = [*COLUMNS, "ref", "other_ids", "other_starts", "other_ref"]
        if args.n_gpu > 1:
            raise ValueError("several GPUs in one process: start with accelerate launch, or set CUDA_VISIBLE_DEVICES")
        if train_dataset is not None:
            count = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
            sampler = super()._get_train_sampler(train_dataset)
            self._ordered = 0 < count < len(train_dataset) and isinstance(sampler, RandomSampler)
            # the order that the engine draws by the seed, whatever the number of steps
            drawn = SeedableRandomSampler(train_dataset, data_seed=args.data_seed, generator=torch.Generator())
            self.train_dataset = self._prepared(train_dataset, list(drawn)[:count] if self._ordered else None)
        self.eval_dataset = None if eval_dataset is None else self._prepared(eval_dataset)

    # rows

    def _prepared(self, rows: Any, places: Sequence[int] | None = None) -> Any:
        """The rows at some places, None: all, with what the loss reads of the reference."""
        if isinstance(rows, Mapping):
            return {name: self._prepared(one) for name, one in rows.items()}
        if any(rows is one for one in self._prepared_ones):
            return rows
        if not len(rows):
            raise ValueError("no rows to train on, or to evaluate")
        paired = len(rows[0]["ids"]) == 2
        if getattr(self, "_paired", paired) != paired:
            raise ValueError("rows to train on and to evaluate must both be pairs, or both single answers")
        self._paired = paired
        if not paired and not learns_single(self.loss):
            raise ValueError(f"loss {self.loss.name!r} takes pairs: got single answers")
        # what others call ref is not of this reference
        rows, places = rows.select_columns(list(COLUMNS)), range(len(rows)) if places is None else places
        if not reads_reference(self.loss):
            found = rows.select(places)
        elif self.state.global_step and self._reference is None:
            remedy = "name them as eval_dataset, or give reference="
            raise ValueError(f"the reference log-probs of further rows must be made before training: {remedy}")
        else:
            found = with_reference(self, cast(nn.Module, self._reference or self.model), rows, places, self._pad)
        self._prepared_ones.append(found)
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(cast(Any, self.train_dataset)) if self._ordered else super()._get_train_sampler()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else self._prepared(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._prepared(test_dataset))

    # the loss

    def log_probs(self, model: nn.Module, batch: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """Log-probs of the labels, (B, S - 1), 0 where ignored, without a gradient."""
        inputs: dict[str, Any] = {name: batch[prefix + name] for name in _INPUTS}
        labels = batch[f"{prefix}labels"]
        with torch.no_grad(), self.accelerator.autocast():
            hidden, head, _ = take_apart(model, **inputs)
            return cast(Tensor, linear_token_stats(hidden[:, :-1], head.weight, labels, **head.options).logp)

    def loss_output(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        totals: Tensor | None = None,
        split: Split | None = None,
        side: Mapping[str, Any] | None = None,
    ) -> LossOutput:
        """The loss of a batch.

        Args:
            totals: (3,) as ``get_batch_samples`` counts them: the loss is the batch's share of one over these; None:
                its own.
            side: side inputs; None: made here.
        """
        side = dict(self.side_inputs(model, batch) if side is None else side)
        if totals is not None:
            names = ("num_items", "num_sequences", "num_chosen_items")[: 3 if self._paired else 2]
            side |= zip(names, totals, strict=False)
        with self.accelerator.autocast():
            inputs: dict[str, Any] = {name: batch[name] for name in _INPUTS}
            hidden, head, _ = take_apart(model, **inputs)
            options = {"split": split, **head.options, **side}
            return linear_loss(hidden[:, :-1], head.weight, batch["labels"], self.loss, **options)

    def side_inputs(self, model: nn.Module, batch: Mapping[str, Tensor], counts: bool = True) -> dict[str, Any]:
        """What the loss reads beside the policy's own statistics; a batch may not count, where others of it do."""
        side = side_inputs_of(self.loss, batch)
        if "kl" in self.loss.needs:
            ratio = (self.log_probs(model, batch, "other_").double() - batch["other_ref_logp"]).sum(1)  # (B,)
            sums = torch.stack([ratio.sum(), ratio.new_tensor(len(ratio))]) * counts
            total, count = self.accelerator.reduce(sums, "sum")
            side["kl"] = (total / count).clamp_min(0)
        return side

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and the loss tokens, answers and tokens of chosen answers in them, of all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps += 1
        # engines that load on several workers may still hold batches on the CPU
        found = (_counts((batch["labels"] != IGNORE).sum(1)).to(device) for batch in batches)
        return batches, self.accelerator.reduce(sum(found, torch.zeros(3, device=device)), "sum")

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        split = None if self.split is None else self.split.at(self.state.global_step / max(1, self.state.max_steps))
        out = self.loss_output(model, inputs, num_items_in_batch, split)
        self._train.add(weighed_metrics(inputs, out, self._paired))
        # engines average gradients over ranks; the shares of the ranks are to be summed
        loss = out.loss * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        return (loss, out) if return_outputs else loss

    # evaluation and what is logged

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        state, sides = self.accelerator.gradient_state, 2 if self._paired else 1
        size = real = len(inputs["signs"]) // sides
        if state.end_of_dataloader and state.remainder > 0:
            # the last batch of each rank is filled with rows that were there before
            real = min(max(state.remainder - self.args.process_index * size, 0), size)
        if 0 < real < size:
            inputs = {name: value.unflatten(0, (sides, size))[:, :real].flatten(0, 1) for name, value in inputs.items()}
        with torch.no_grad():
            side = self.side_inputs(model, inputs, counts=real > 0)
            out = self.loss_output(model, inputs, self._eval_totals, side=side)
        self._eval.add(weighed_metrics(inputs, out, self._paired), counts=real > 0)
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        counted = torch.tensor(dataloader.dataset["tokens"]).T.reshape(-1)
        self._eval_totals = _counts(counted).to(self.args.device)
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        found = self._eval.take(self.accelerator)
        cast(Any, output.metrics).update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            # older engines round the loss
            logs |= self._train.take(self.accelerator, self._steps)
            self._steps = 0
            loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
            if self.accelerator.scaler is not None and not math.isfinite(norm):
                # the scaler of float16 skips such a step and halves its scale
                norm = 0.0
                del logs["grad_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                step = self.state.global_step
                raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}; a lower learning rate?")
        super().log(logs, *args, **kwargs)

    # checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, ".incomplete") if self._aside else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        self._check_finite()
        state, folder = self.state, Path(self._get_output_dir(trial))
        aside, whole = (place / f"checkpoint-{state.global_step}" for place in (folder / ".incomplete", folder))
        if self.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = True
        try:
            with writing(aside.name):
                super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self._aside = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if state.best_model_checkpoint is not None:
                state.best_model_checkpoint = str(folder / Path(state.best_model_checkpoint).name)
                state.save_to_json(str(aside / "trainer_state.json"))
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(aside, whole)
            shutil.rmtree(aside.parent, ignore_errors=True)
            self._rotate(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(whole))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # what is sent in the background must not be renamed meanwhile
        if not self._aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _check_finite(self) -> None:
        """Stop before weights that are no numbers replace a good checkpoint; on all ranks where one has them."""
        model: Any = self.model
        local = [getattr(parameter, "to_local", lambda one=parameter: one)() for parameter in trained(model)]
        wrong = sum((~one.detach().isfinite().all() for one in local), torch.zeros((), device=self.args.device))
        if self.accelerator.reduce(wrong, "sum") > 0:
            raise FloatingPointError(f"step {self.state.global_step}: weights are no numbers; a lower learning rate?")

    def _rotate(self, folder: Path) -> None:
        """Delete the oldest checkpoints beyond ``save_total_limit``, never the best one."""
        limit = self.args.save_total_limit
        found = sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))
        for old in found[:-limit] if limit and limit > 0 else []:
            if str(old) != self.state.best_model_checkpoint:
                shutil.rmtree(old, ignore_errors=True)


def _counts(tokens: Tensor) -> Tensor:
    """Loss tokens, answers, and loss tokens of the first half: (B,) -> (3,)."""
    return torch.stack([tokens.sum(), tokens.new_tensor(len(tokens)), tokens[: len(tokens) // 2].sum()]).float()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
