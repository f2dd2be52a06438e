"""Rollouts in a file: written, read, refused, and made by TRL's trainers."""

from __future__ import annotations

import json

import pytest
import torch

from fused_po import losses
from fused_po.diagnostics import (
    Rollout,
    RolloutDump,
    gradient_alignment,
    read_rollouts,
    rollout_examples,
    write_rollouts,
)
from fused_po.diagnostics.rollouts import at_step, from_trainer, is_rollouts
from tests.test_checkpoints import tiny

ROWS = [
    Rollout([3, 4, 5], [6, 7], [-0.5, -1.5], None, 1.0, None, 10),
    Rollout([3], [8, 9, 10], [-0.25, -2.0, -1.0], None, -0.5, [1, 0, 1], 10),
    Rollout([2, 2], [1], [-3.0], None, [0.75], None, 20),
]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, ROWS[:1])
    write_rollouts(path, ROWS[1:], append=True)
    assert read_rollouts(path, vocabulary=11) == ROWS
    assert is_rollouts(path)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {
        "prompt_ids": [3, 4, 5],
        "answer_ids": [6, 7],
        "old_logps": [-0.5, -1.5],
        "advantage": 1.0,
        "step": 10,
    }
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert not is_rollouts(tmp_path / "pairs.jsonl") and not is_rollouts(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer_ids": [1.5]}, "answer_ids must be a list of token ids"),
        ({"prompt_ids": None}, "prompt_ids must be a list of token ids"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"answer_ids": [40]}, "holds token 40, the model has embeddings for 32"),
        ({"old_logps": [-1.0]}, "old_logps has 1 numbers, answer_ids 2 tokens"),
        ({"old_logps": [-1.0, float("nan")]}, "old_logps must be finite numbers"),
        ({"advantage": "high"}, "advantage must be finite numbers"),
        ({"mask": 1}, "mask must be a list of 0 and 1"),
        ({"step": -1}, "step must be a whole number"),
        ({"reward": 1.0}, "unknown field 'reward'"),
    ],
)
def test_a_line_that_is_no_rollout_is_named(tmp_path, change, message):
    path = tmp_path / "rollouts.jsonl"
    good = {"prompt_ids": [1], "answer_ids": [2, 3]}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        read_rollouts(path, vocabulary=32)


def test_files_without_a_rollout(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rollout"):
        read_rollouts(path)
    path.write_text('{"prompt_ids": [1], "answer_ids": []}\n')
    with pytest.raises(ValueError, match="every answer is empty"):
        read_rollouts(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: an object is wanted, got list"):
        read_rollouts(path)
    with pytest.raises(ValueError, match="can't be read"):
        read_rollouts(tmp_path / "nowhere.jsonl")


def test_examples_hold_each_number_at_its_token():
    reads = losses.create("ppo").needs
    (found,) = rollout_examples(ROWS, 0, reads, batch_size=8)
    assert found.inputs["input_ids"].tolist() == [[3, 4, 5, 6, 7], [3, 8, 9, 10, 0], [2, 2, 1, 0, 0]]
    assert found.labels.tolist() == [[-100, -100, 6, 7], [8, -100, 10, -100], [-100, 1, -100, -100]]
    assert found.side_inputs["old_logp"].tolist() == [[0, 0, -0.5, -1.5], [-0.25, -2, -1, 0], [0, -3, 0, 0]]
    assert found.side_inputs["advantage"].tolist() == [[0, 0, 1, 1], [-0.5, -0.5, -0.5, 0], [0, 0.75, 0, 0]]
    # one number each, where all have one
    sums = [Rollout([1], [2], -1.0, None, 0.5), Rollout([1], [2, 3], -2.0, None, -0.5)]
    (found,) = rollout_examples(sums, 0, reads)
    assert found.side_inputs["advantage"].tolist() == [0.5, -0.5] and found.side_inputs["old_logp"].tolist() == [-1, -2]
    assert [len(one.labels) for one in rollout_examples(ROWS, 0, batch_size=2)] == [2, 1]
    with pytest.raises(ValueError, match="the loss reads advantage, which 1 of 1 rollouts lack"):
        rollout_examples([Rollout([1], [2])], 0, reads)
    with pytest.raises(ValueError, match="old_logps is a sum in some rollouts and one per token in others"):
        rollout_examples([sums[0], ROWS[0]], 0, reads)


def test_rollouts_of_a_checkpoint_are_the_last_by_then():
    assert at_step(ROWS, 10) == ROWS[:2] == at_step(ROWS, 19) == at_step(ROWS, 3)
    assert at_step(ROWS, 20) == ROWS[2:] == at_step(ROWS, 99)
    nobody = [Rollout([1], [2])]
    assert at_step(nobody, 5) == nobody


def test_old_log_probs_matter_to_g():
    """The same rollouts with the ratio of 1 and with that of the file."""
    model, loss, target = tiny(0), losses.create("ppo"), [Rollout([3, 4], [5, 6])]
    known = [
        Rollout([1, 2], [5, 6, 7], [-3.4, -3.5, -3.4], None, 1.0),
        Rollout([1, 2], [8, 9], [-3.5, -3.4], None, -1.0),
    ]
    unknown = [Rollout(one.prompt_ids, one.answer_ids, None, None, one.advantage) for one in known]
    wholes = []
    for rows in (known, unknown):
        data = rollout_examples(rows, 0, loss.needs)
        wholes.append(gradient_alignment(model, data, loss, rollout_examples(target, 0), method="exact")["whole"])
    assert "old_logp" not in rollout_examples(unknown, 0, loss.needs)[0].side_inputs
    assert wholes[0] != wholes[1] and wholes[0] == pytest.approx(wholes[1], rel=0.2)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_trl_trainers_dump_what_they_learn_from(kind, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed: its trainers are not run")
    from trl import GRPOTrainer, RLOOTrainer

    from tests.trainers.trl_runs import run

    path, seen = tmp_path / "rollouts.jsonl", []

    class Dumped({"grpo": GRPOTrainer, "rloo": RLOOTrainer}[kind]):  # type: ignore[misc]
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            real = self._generate_and_score_completions

            def noted(inputs):
                batch = real(inputs)
                seen.append((self.state.global_step, batch))
                return batch

            self._generate_and_score_completions = noted
            RolloutDump(path, every=2).attach(self)

    run(kind, Dumped, tmp_path, beta=0.0)
    rows = read_rollouts(path)
    steps = sorted({one.step for one in rows})
    # answers are drawn every second step, for two
    assert steps and all(step % 2 == 0 for step in steps) and steps[0] == 0
    for step in steps:
        batch = next(batch for at, batch in seen if at == step)
        own = [one for one in rows if one.step == step]
        assert own == from_trainer(batch, step)
        for index, one in enumerate(own):
            length = int(batch["completion_mask"][index].sum())
            assert one.answer_ids == batch["completion_ids"][index][:length].tolist()
            assert one.advantage == pytest.approx(batch["advantages"][index].item())
            assert one.prompt_ids == batch["prompt_ids"][index][batch["prompt_mask"][index].bool()].tolist()
            if kind == "rloo":
                assert one.old_logps == pytest.approx(batch["old_logps"][index].item())
            elif "old_per_token_logps" in batch:
                assert one.old_logps == pytest.approx(batch["old_per_token_logps"][index][:length].tolist())
    assert any(one.advantage for one in rows)
    with pytest.raises(ValueError, match="object draws no rollouts: a GRPO or RLOO trainer"):
        RolloutDump(path).attach(object())
    with pytest.raises(ValueError, match="every must be at least 1"):
        RolloutDump(path, every=0)


def test_a_tool_mask_leaves_tokens_out():
    batch = {
        "prompt_ids": torch.tensor([[0, 5, 6]]),
        "prompt_mask": torch.tensor([[0, 1, 1]]),
        "completion_ids": torch.tensor([[7, 8, 9, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
        "advantages": torch.tensor([0.5]),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, -3.0, 0.0]]),
    }
    assert from_trainer(batch, 4) == [Rollout([5, 6], [7, 8, 9], [-1.0, -2.0, -3.0], None, 0.5, [1, 0, 1], 4)]
