"""DPO on pairs and PPO (or GRPO) on rollouts, both through ``linear_loss``."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_po import advantages, losses
from fused_po.diagnostics import Examples
from fused_po.losses import Loss
from fused_po.ops import linear_loss
from fused_po.splits import Split
from fused_po.study.policy import Language, Sample, sample, token_logp
from fused_po.study.settings import Arm, Settings
from fused_po.study.task import Prompt, reward
from fused_po.trainers.batches import AnswerBatch
from fused_po.trainers.model import hidden_and_head

__all__ = ["MAX_TOKENS", "Learner", "PairLearner", "RolloutLearner", "batch_loss", "pair_examples", "supervise"]

# of an answer: three terms of three digits, two signs and the end are 12
MAX_TOKENS = 14


def supervise(
    model: Any, language: Language, demonstrations: Iterator[list[Sample]], settings: Settings
) -> Iterator[int]:
    """Train on demonstrations; yields the number of steps done after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.sft_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.sft_lr, total_steps=settings.sft_steps)
    loss = losses.create("sft")
    model.train()
    for step in range(1, settings.sft_steps + 1):
        batch = language.pad(next(demonstrations), next(model.parameters()).device)
        _backward(model, batch, loss, None, {})
        _update(optimizer, model)
        schedule.step()
        yield step
    model.eval()


def pair_examples(
    start: nn.Module, language: Language, pairs: Sequence[tuple[Sample, Sample]], device: torch.device
) -> Examples:
    """Pairs of a right and a wrong answer as examples for DPO, with the start as the reference."""
    batch = language.pad([right for right, _ in pairs] + [wrong for _, wrong in pairs], device)
    with torch.no_grad():
        reference = token_logp(start, batch).double().sum(1)
    return Examples(_inputs(batch), batch.labels, {"ref_logp": reference})


class Learner:
    """A model in training; ``loss`` is what it descends on, ``arm`` how."""

    def __init__(self, model: nn.Module, loss: Loss, arm: Arm, lr: float, settings: Settings) -> None:
        self.model, self.loss, self.arm, self.settings = model, loss, arm, settings
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        self.done = 0

    def step(self) -> None:
        """One update of the policy."""
        raise NotImplementedError

    def examples(self) -> list[Examples]:
        """D at the model's parameters, each draw of it for itself. Training does not notice."""
        raise NotImplementedError

    def _learn(self, examples: Examples) -> None:
        split = None if self.arm.split is None else self.arm.split.at(self.done / self.settings.steps)
        _backward(self.model, _batch(examples), self.loss, split, examples.side_inputs)
        _update(self.optimizer, self.model)
        self.done += 1


class PairLearner(Learner):
    """DPO: the same pairs again and again, in an order of its own."""

    def __init__(
        self,
        start: nn.Module,
        language: Language,
        pairs: Sequence[tuple[Sample, Sample]],
        arm: Arm,
        settings: Settings,
        seed: int,
    ) -> None:
        loss = losses.create("sigmoid", beta=settings.beta)
        super().__init__(copy.deepcopy(start), loss, arm, settings.dpo_lr, settings)
        self._all = pair_examples(start, language, pairs, self.device)
        self._order = self._orders(len(pairs), random.Random(seed))

    def step(self) -> None:
        self._learn(_rows(self._all, next(self._order)))

    def examples(self) -> list[Examples]:
        """All pairs: what DPO descends on, without an error of drawing."""
        return [self._all]

    def _orders(self, count: int, draw: random.Random) -> Iterator[list[int]]:
        size = min(self.settings.batch // 2, count)
        while True:
            order = draw.sample(range(count), count)
            for first in range(0, count - size + 1, size):
                yield _both(order[first : first + size], count)


class RolloutLearner(Learner):
    """PPO with a clip, a value model of its own and GAE; or GRPO. Rewards stand at the last token of an answer."""

    def __init__(
        self,
        start: nn.Module,
        language: Language,
        prompts: Sequence[Prompt],
        arm: Arm,
        settings: Settings,
        seed: int,
    ) -> None:
        loss = losses.create(settings.policy_loss, epsilon=settings.epsilon)
        super().__init__(copy.deepcopy(start), loss, arm, settings.ppo_lr, settings)
        self._language, self._prompts, self._random = language, prompts, random.Random(seed)
        self._probing = random.Random(seed)
        self._start = start
        self._critic = None if settings.policy_loss == "grpo" else _Critic(start, settings.critic_lr)
        self._waiting: list[Examples] = []

    def step(self) -> None:
        if not self._waiting:
            rollouts = self._rollouts(self.settings.batch * self.settings.minibatches, self._random)
            for _ in range(self.settings.epochs):
                order = self._random.sample(range(rollouts.labels.shape[0]), rollouts.labels.shape[0])
                for first in range(0, len(order), self.settings.batch):
                    self._waiting.append(_rows(rollouts, order[first : first + self.settings.batch]))
        examples = self._waiting.pop(0)
        if self._critic is not None:
            self._critic.learn(examples)
        side_inputs = {name: value for name, value in examples.side_inputs.items() if name in self.loss.needs}
        self._learn(Examples(examples.inputs, examples.labels, side_inputs))

    def examples(self) -> list[Examples]:
        """Fresh rollouts: before an update the ratio to the sampling policy is 1, and nothing is clipped."""
        found = []
        # an arm that is probed goes on with the draws of one that is not
        with torch.random.fork_rng():
            for _ in range(self.settings.draws):
                torch.manual_seed(self._probing.getrandbits(63))
                one = self._rollouts(self.settings.samples, self._probing)
                found.append(Examples(one.inputs, one.labels, {"advantage": one.side_inputs["advantage"]}))
        return found

    def _rollouts(self, count: int, draw: random.Random) -> Examples:
        generations = self.settings.generations
        prompts = [p for p in draw.choices(self._prompts, k=count // generations) for _ in range(generations)]
        samples = sample(self.model, self._language, prompts, MAX_TOKENS)
        rewards = torch.tensor([reward(one.prompt, one.text) for one in samples], device=self.device)
        batch = self._language.pad(samples, self.device)
        with torch.no_grad():
            found = {"old_logp": token_logp(self.model, batch)}
            penalty = torch.zeros_like(found["old_logp"])
            if self.arm.kl:
                penalty = self.arm.kl * (found["old_logp"] - token_logp(self._start, batch))
        if self._critic is None:
            found["advantage"] = advantages.group_relative(rewards - penalty.sum(1), num_generations=generations)
        else:
            found |= self._critic.judge(batch, rewards, penalty)
        return Examples(_inputs(batch), batch.labels, found)


class _Critic:
    """A value model: a copy of the start's backbone with one number per position."""

    def __init__(self, start: nn.Module, lr: float) -> None:
        self._model = copy.deepcopy(start)
        _, head = hidden_and_head(self._model)
        self._head = nn.Linear(head.weight.shape[1], 1).to(head.weight)
        nn.init.zeros_(self._head.weight)
        nn.init.zeros_(self._head.bias)
        self._parameters = [*self._model.parameters(), *self._head.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=lr, weight_decay=0.0)

    def _values(self, inputs: Any) -> Tensor:
        backbone, _ = hidden_and_head(self._model)
        values: Tensor = self._head(backbone(**inputs)[:, :-1])[..., 0]
        return values

    @torch.no_grad()
    def judge(self, batch: AnswerBatch, rewards: Tensor, penalty: Tensor) -> dict[str, Tensor]:
        """Advantages, whitened, with returns and values, (B, S - 1) each, from rewards (B,) less a penalty per token,
        (B, S - 1).
        """
        mask, values = batch.labels != -100, self._values(_inputs(batch))
        # the reward stands at the last token of each answer
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        found, returns = advantages.gae(torch.where(last, rewards.unsqueeze(1), 0.0) - penalty, values, mask)
        return {"advantage": advantages.whiten(found, mask), "returns": returns, "values": values}

    def learn(self, examples: Examples) -> None:
        values, given = self._values(examples.inputs), examples.side_inputs
        losses.value_loss(values, given["returns"], given["values"], examples.labels != -100).backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def batch_loss(
    model: nn.Module, batch: AnswerBatch, loss: Loss, split: Split | None, side_inputs: Mapping[str, Any]
) -> Tensor:
    """The loss of a batch, (), to be differentiated."""
    backbone, head = hidden_and_head(model)
    hidden = backbone(**_inputs(batch))[:, :-1]
    return linear_loss(hidden, head.weight, batch.labels, loss, split=split, **head.options, **side_inputs).loss


def _backward(
    model: nn.Module, batch: AnswerBatch, loss: Loss, split: Split | None, side_inputs: Mapping[str, Any]
) -> None:
    value = batch_loss(model, batch, loss, split, side_inputs)
    if not value.isfinite():
        raise FloatingPointError(f"the loss is {value.item()}; a smaller learning rate?")
    value.backward()


def _update(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _inputs(batch: AnswerBatch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def _batch(examples: Examples) -> AnswerBatch:
    return AnswerBatch(examples.inputs["input_ids"], examples.inputs["attention_mask"], examples.labels)


def _rows(examples: Examples, rows: Sequence[int]) -> Examples:
    index = torch.tensor(rows, device=examples.labels.device)
    taken = ({name: value[index] for name, value in given.items()} for given in (examples.inputs, examples.side_inputs))
    inputs, side_inputs = taken
    return Examples(inputs, examples.labels[index], side_inputs)


def _both(pairs: Sequence[int], count: int) -> list[int]:
    """The rows of pairs: first half chosen, second half rejected."""
    return [*pairs, *(count + pair for pair in pairs)]
