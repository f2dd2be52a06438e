"""``PreferenceTrainer``: normalisers, metrics, references, checkpoints; and two processes that give what one does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fused_po import Split, linear_loss, losses, splits
from fused_po.cli import main
from fused_po.diagnostics import Examples
from fused_po.diagnostics.callback import GradientAlignmentCallback
from fused_po.trainers.batches import collate
from fused_po.trainers.model import hidden_and_head, token_stats_of
from fused_po.trainers.preferences import PreferenceTrainer
from tests.forked import on_ranks, python
from tests.test_train import WORDS, small_model

VOCABULARY = 50


def rows(count: int = 8, seed: int = 0, single: bool = False) -> Dataset:
    """Random pairs, or single answers, of different lengths."""
    draw = torch.Generator().manual_seed(seed)

    def ids(size: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (size,), generator=draw).tolist()

    found = []
    for index in range(count):
        prompt, sides = ids(1 + index % 3), [1 if index % 3 else -1] if single else [1, -1]
        answers = [ids(1 + (index + side) % 4) for side in sides]
        row = {"ids": [prompt + answer for answer in answers], "starts": [len(prompt)] * len(sides), "signs": sides}
        found.append({**row, "tokens": [len(answer) for answer in answers]})
    return Dataset.from_list(found)


def model_of(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, pad_token_id=0))


def trainer_of(folder: Path, loss: Any, train: Any = None, evaluate: Any = None, **options: Any) -> PreferenceTrainer:
    own = {name: options.pop(name) for name in ("split", "reference", "callbacks") if name in options}
    model = options.pop("model", None) or model_of()
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    settings |= {"logging_steps": 1, "optim": "sgd", "max_grad_norm": 1e9, "use_cpu": True, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "logging_nan_inf_filter": False}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return PreferenceTrainer(model, args, rows() if train is None else train, evaluate, loss=loss, **own)


def by_hand(loss: Any, data: Any, policy: Any, reference: Any, split: Split | None = None) -> tuple[Any, list[Tensor]]:
    """The loss of all rows in one call, and its gradients."""
    batch = collate(list(data), 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logp = token_stats_of(reference, inputs, batch["labels"]).logp
    side = {"ref_logp": logp, "old_logp": logp, "advantage": batch["signs"].float(), "desirable": batch["signs"] > 0}
    side = {name: value for name, value in side.items() if name in loss.needs}
    backbone, head = hidden_and_head(policy)
    hidden = backbone(**inputs)[:, :-1]
    out = linear_loss(hidden, head.weight, batch["labels"], loss, split=split, **head.options, **side)
    gradients = torch.autograd.grad(out.loss, list(policy.parameters()))
    return out, list(gradients)


def stepped(trainer: PreferenceTrainer) -> list[Tensor]:
    """The gradient that plain SGD took, of each parameter."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    return [(old - new.detach()) / 0.1 for old, new in zip(before, trainer.model.parameters(), strict=True)]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    """To the rounding of float32 weights, which the gradients were read off."""
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() <= 1e-5 * max(1.0, other.norm().item())


@pytest.mark.parametrize("name", ["sigmoid", "sft", "dapo", "cispo", "bco_pair", "apo_zero_unpaired", "orpo"])
@pytest.mark.parametrize(("size", "steps"), [(8, 1), (2, 4), (3, 3)])
def test_accumulated_batches_are_one_batch(tmp_path, name, size, steps):
    """Normalisers count all micro-batches of a step, the last and smaller one too."""
    loss = losses.create(name, **({"paired": True} if name == "sft" else {}))
    reference = model_of(1)
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
    trainer = trainer_of(tmp_path, loss, reference=reference, **options)
    out, wanted = by_hand(loss, rows(), model_of(), reference)
    assert_close(stepped(trainer), wanted)
    logged = trainer.state.log_history[0]
    # a sum of terms of size one, in float32
    assert logged["loss"] == pytest.approx(out.loss.item(), rel=1e-5, abs=1e-7)
    for metric, value in out.metrics.items():
        # extremes are those of a call
        if not metric.endswith(("_min", "_max")):
            assert logged[metric] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("name", ["sigmoid", "sft", "dapo", "cispo"])
def test_an_evaluation_is_that_of_all_rows_at_once(tmp_path, name):
    loss = losses.create(name, **({"paired": True} if name == "sft" else {}))
    reference, held_out = model_of(1), rows(5, seed=3)
    trainer = trainer_of(tmp_path, loss, None, held_out, reference=reference, per_device_eval_batch_size=2)
    found = trainer.evaluate()
    out, _ = by_hand(loss, held_out, model_of(), reference)
    assert found["eval_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    means = {metric: value for metric, value in out.metrics.items() if not metric.endswith(("_min", "_max"))}
    for metric, value in means.items():
        assert found[f"eval_{metric}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), metric


def test_single_answers(tmp_path):
    loss, reference, data = losses.create("apo_zero_unpaired"), model_of(1), rows(7, single=True)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 7, "max_steps": 1}
    trainer = trainer_of(tmp_path, loss, data, reference=reference, **options)
    out, wanted = by_hand(loss, data, model_of(), reference)
    assert_close(stepped(trainer), wanted)
    # batches without a desirable answer count for nothing
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert trainer.state.log_history[0][metric] == pytest.approx(out.metrics[metric].item(), rel=1e-5)
    with pytest.raises(ValueError, match="loss 'sigmoid' takes pairs: got single answers"):
        trainer_of(tmp_path, losses.create("sigmoid"), data)
    with pytest.raises(ValueError, match="must both be pairs, or both single answers"):
        trainer_of(tmp_path, loss, data, rows(3))


def test_a_split_follows_its_schedule(tmp_path):
    loss, split, reference = losses.create("sigmoid"), splits.controlled_dpo(), model_of(1)
    trainer = trainer_of(tmp_path, loss, split=split, reference=reference, per_device_train_batch_size=8, max_steps=2)
    policy = model_of()
    for progress in (0.0, 0.5):
        _, gradients = by_hand(loss, rows(), policy, reference, split.at(progress))
        with torch.no_grad():
            for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    trainer.train()
    for ours, theirs in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Counted(LlamaForCausalLM):
    """Counts the sequences that it is asked about."""

    seen = 0

    def forward(self, input_ids: Any = None, **given: Any) -> Any:
        self.seen += len(input_ids)
        return super().forward(input_ids, **given)


def counted(seed: int) -> Any:
    model = model_of(seed)
    model.__class__ = Counted
    return model


def test_predictions_are_an_evaluation_by_another_name(tmp_path):
    loss, data = losses.create("sigmoid"), rows(5, seed=3)
    trainer = trainer_of(tmp_path, loss, None, data, reference=model_of(1))
    wanted = trainer.evaluate()
    found = trainer.predict(data)
    assert found.predictions is None and found.metrics["test_loss"] == wanted["eval_loss"] != pytest.approx(
        0.6931, abs=1e-4
    )
    assert found.metrics["test_rewards/margins"] == wanted["eval_rewards/margins"]
    both = trainer.evaluate({"one": data, "two": rows(3)})
    assert both["eval_one_loss"] == wanted["eval_loss"] != both["eval_two_loss"]


def test_the_order_does_not_depend_on_the_steps(tmp_path):
    """So a run that is continued for longer sees what one of that length would have seen."""
    seen = []
    for steps in (2, 4, 9):
        options = {"max_steps": steps, "per_device_train_batch_size": 2}
        trainer = trainer_of(tmp_path, losses.create("sft", paired=True), rows(9), **options)
        loader = trainer.get_train_dataloader()
        loader.set_epoch(0)
        seen.append([batch["input_ids"].tolist() for batch in loader])
    assert [len(one) for one in seen] == [2, 4, 5]
    assert seen[0] == seen[1][:2] == seen[2][:2] and seen[1] == seen[2][:4]
    loader.set_epoch(1)
    assert [batch["input_ids"].tolist() for batch in loader] != seen[2]


def test_kto_compares_answers_to_other_prompts(tmp_path):
    """The reference point is that of each prompt with the answers of the next row, whatever the batch size."""
    loss, reference, data = losses.create("kto"), model_of(1), rows(4)
    listed = list(data)
    swapped = [
        {
            "ids": [
                (ids[: row["starts"][0]] + other["ids"][side][other["starts"][side] :])[
                    : max(len(ids), len(other["ids"][side]))
                ]
                for side, ids in enumerate(row["ids"])
            ],
            "starts": row["starts"],
            "signs": row["signs"],
        }
        for row, other in zip(listed, [*listed[1:], listed[0]], strict=True)
    ]
    batch = collate(swapped, 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        policy, start = (token_stats_of(m, inputs, batch["labels"]).logp.sum(1) for m in (model_of(), reference))
    trainer = trainer_of(tmp_path, loss, data, reference=reference, per_device_train_batch_size=4, max_steps=1)
    trainer.train()
    wanted = max((policy - start).mean().item(), 0.0)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(wanted, rel=1e-4)
    # one row at a time has answers of another row too
    one = trainer_of(tmp_path, loss, data, data, reference=reference, per_device_eval_batch_size=1)
    assert one.train_dataset[0]["other_ids"] != one.train_dataset[0]["ids"]
    same = Dataset.from_list([listed[0]] * 3)
    with pytest.raises(ValueError, match="kto needs rows with different prompts"):
        trainer_of(tmp_path, loss, same)


def test_checkpoints_are_whole_or_not_there(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 4}
    trainer = trainer_of(tmp_path, losses.create("sft", paired=True), **options)
    before = PreferenceTrainer._save_rng_state

    def fail(self: Any, folder: str) -> None:
        before(self, folder)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(PreferenceTrainer, "_save_rng_state", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sorted(os.listdir(tmp_path)) == [".incomplete", "checkpoint-2", "checkpoint-3"]
    assert "trainer_state.json" in os.listdir(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    again = trainer_of(tmp_path, losses.create("sft", paired=True), **options)
    again.train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "checkpoint-4"]
    assert LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4").num_parameters()


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(
        tmp_path, losses.create("sft", paired=True), None, rows(4, seed=5), **options, learning_rate=3.0
    )
    trainer.train()
    losses_seen = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = 1 + losses_seen.index(min(losses_seen))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses_seen), rel=1e-5)


def test_what_can_not_be_trained(tmp_path):
    frozen = model_of().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trained"):
        trainer_of(tmp_path, losses.create("sigmoid"), model=frozen)
    trainer = trainer_of(tmp_path, losses.create("sigmoid"))
    trainer.train()
    with pytest.raises(ValueError, match="must be made before training"):
        trainer.evaluate(rows(3))
    diverging = trainer_of(tmp_path, losses.create("sft", paired=True), learning_rate=1e30, max_steps=5)
    with pytest.raises(FloatingPointError, match="a lower learning rate"):
        diverging.train()


def test_g_is_a_callback(tmp_path):
    data = collate(list(rows(4)), 0)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    examples = [Examples(inputs, data["labels"])]
    loss = losses.create("sft", paired=True)
    trainer = trainer_of(tmp_path, loss)
    callback = GradientAlignmentCallback(examples, loss, examples, every=2, parts=("whole",)).attach(trainer)
    trainer.train()
    assert [step for step, _ in callback.history] == [0, 2]
    assert any("G/whole" in row for row in trainer.state.log_history[1:])


def train_on_rank(rank: int, arguments: list[str]) -> None:
    """What a launcher says of a rank, whose process group is there already."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update({name: str(value) for name, value in said.items()})
    assert main(arguments) == 0


@pytest.mark.parametrize("loss", ["sigmoid", "dapo"])
def test_two_processes_are_one(tmp_path, loss):
    """With accumulation and an evaluation that does not fill its last batch: one loss under ``accelerate launch``."""
    folder = small_model(tmp_path)
    sentences = [
        {
            "prompt": f"Is it {word}?" + " Really?" * (index % 3),
            "chosen": f"Yes, it is {word}." + " Sure." * (index % 4),
            "rejected": "Go away now." * (1 + index % 2),
        }
        for index, word in enumerate(WORDS + WORDS[:2])
    ]
    for name, count in (("train", 8), ("eval", 5)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences[:count]))
    command = ["-m", "fused_po", "train", "--model", folder, "--data", str(tmp_path / "train.jsonl"), "--loss", loss]
    command += ["--eval-data", str(tmp_path / "eval.jsonl"), "--eval-every", "2", "--steps", "4", "--lr", "1e-3"]
    runs = {
        name: [*command, "--output", str(tmp_path / name), "--batch-size", size, "--gradient-accumulation-steps", steps]
        for name, size, steps in (("one", "4", "1"), ("two", "1", "2"))
    }
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launched = [runs["one"], *([[*launch, *runs["two"]]] if loss == "sigmoid" else [])]
    for arguments in launched:
        run = python(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(sys.path))
        assert run.returncode == 0, run.stderr[-2000:]
    if loss != "sigmoid":
        on_ranks(train_on_rank, 2, tmp_path, runs["two"][2:])
    texts = {name: (tmp_path / name / "metrics.jsonl").read_text() for name in runs}
    found = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    for alone, shared in zip(found["one"], found["two"], strict=True):
        assert alone.keys() == shared.keys()
        for metric, value in alone.items():
            # extremes are those of a call
            if not metric.endswith(("_min", "_max")):
                assert shared[metric] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5))
    ours, theirs = (LlamaForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in runs)
    assert all((ours[key] - theirs[key]).norm() <= 1e-5 * theirs[key].norm() for key in theirs)
