"""What a study is made of; the defaults fit a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from fused_po import splits
from fused_po.splits import Split

__all__ = ["ARMS", "FIRST_SEED", "METHODS", "QUICK", "SEEDS", "TUNED", "Arm", "Settings"]

METHODS = ("dpo", "ppo")

# enough that Holm's first step finds an effect of one standard deviation in four of five studies
SEEDS = 20
# seeds below this have chosen settings and schedules, and test nothing
TUNED = 200
FIRST_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        split: how the sides and the weights of the loss count; None: as they are.
        kl: PPO's penalty on log(pi / start), in units of reward per nat and token.
    """

    split: Split | None = None
    kl: float = 0.0


# by method, what is trained: the method itself, the ablations, and the controlled variant
ARMS: dict[str, dict[str, Arm]] = {
    method: {
        "full": Arm(),
        "no negative": Arm(splits.positive_only()),
        "no positive": Arm(splits.negative_only()),
        "no reweighting": Arm(splits.no_reweighting()),
        "controlled": Arm(controlled),
    }
    for method, controlled in (("dpo", splits.controlled_dpo()), ("ppo", splits.controlled_ppo()))
}
ARMS["ppo"]["KL penalty"] = Arm(kl=0.02)


@dataclass(frozen=True)
class Settings:
    """Numbers of a study.

    Attributes:
        hidden_size, layers: of the model, a random Llama with a token per character.
        largest: totals of the task go from 10 to this.
        noise: share of wrong sums in the demonstrations, so that the start has something to learn.
        sft_steps, sft_lr, sft_batch: of the supervised start, common to all arms of a seed.
        steps: updates of DPO, and of PPO (each rollout gives ``epochs`` x ``minibatches`` of them).
        pairs: preference pairs that DPO learns from, a right and a wrong answer of the start each.
        batch: answers in an update.
        dpo_lr, ppo_lr: learning rates.
        beta: DPO's.
        policy_loss: ``ppo`` (clip, value model, GAE per token) or ``grpo`` (group-relative, no value model).
        epsilon: PPO's clip.
        epochs, minibatches: PPO's, per rollout.
        generations: answers to each prompt in a rollout.
        critic_lr: of the value model.
        checkpoints: how many models of a run are measured, the first and the last included; at least 5.
        samples: answers of an evaluation, and of a draw of PPO's D.
        draws: how often PPO's D is drawn at a checkpoint; what two draws differ in is no change of the policy.
        final_draws: how often D' is drawn from the final model, besides its greedy answers: an answer to each training
            prompt each time.
        device: where it runs.
    """

    hidden_size: int = 64
    layers: int = 2
    largest: int = 30
    noise: float = 0.4
    sft_steps: int = 600
    sft_lr: float = 4e-3
    sft_batch: int = 128
    steps: int = 240
    pairs: int = 512
    batch: int = 64
    dpo_lr: float = 1e-4
    ppo_lr: float = 3e-4
    beta: float = 0.1
    policy_loss: str = "ppo"
    epsilon: float = 0.2
    epochs: int = 2
    minibatches: int = 2
    generations: int = 4
    critic_lr: float = 1e-3
    checkpoints: int = 9
    samples: int = 256
    draws: int = 4
    final_draws: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        low = {"largest": 11, "checkpoints": 5, "generations": 2 if self.policy_loss == "grpo" else 1, "draws": 2}
        # a pair, and an answer for each generation
        low["samples"] = max(2, self.generations)
        low["final_draws"] = 2
        counts = ("hidden_size", "layers", "sft_steps", "sft_batch", "steps", "pairs", "batch", "epochs")
        for name in (*low, *counts, "minibatches"):
            if getattr(self, name) < low.get(name, 1):
                raise ValueError(f"{name} must be at least {low.get(name, 1)}: got {getattr(self, name)}")
        if self.largest > 999:
            raise ValueError(f"largest must be at most 999, more does not fit into an answer: got {self.largest}")
        for name in ("sft_lr", "dpo_lr", "ppo_lr", "critic_lr", "beta", "epsilon"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive: got {getattr(self, name)}")
        if not 0.0 <= self.noise < 1.0:
            raise ValueError(f"noise must lie in [0, 1): got {self.noise}")
        if self.policy_loss not in ("ppo", "grpo"):
            raise ValueError(f"policy_loss must be one of ppo, grpo: got {self.policy_loss!r}")
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size must be a multiple of 32: got {self.hidden_size}")
        if self.checkpoints > self.steps + 1:
            raise ValueError(f"checkpoints must be at most steps + 1, {self.steps + 1}: got {self.checkpoints}")
        if self.batch % 2 or self.batch % self.generations:
            raise ValueError(f"batch must be even and a multiple of generations: got {self.batch}")

    @property
    def measured(self) -> tuple[int, ...]:
        """The updates after which a run is measured."""
        last = self.checkpoints - 1
        return tuple(round(self.steps * index / last) for index in range(self.checkpoints))


# of ``--quick``: it shows that everything runs, not what preference optimization does
QUICK: dict[str, int] = {
    "hidden_size": 32,
    "layers": 1,
    "largest": 14,
    "sft_steps": 120,
    "steps": 24,
    "pairs": 32,
    "batch": 16,
    "checkpoints": 5,
    "samples": 32,
    "draws": 2,
    "final_draws": 2,
}
