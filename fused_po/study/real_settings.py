"""What a study of a pretrained model is made of; the defaults are those of recipes for such models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fused_po.splits import Split
from fused_po.study.settings import ARMS

__all__ = ["NAMES", "REAL_METHODS", "RealSettings", "arms_of", "folder_of"]

# a policy method's arms are those of the small study's PPO: TRL's GRPO has PPO's clipped loss, and a baseline from
# several answers to a prompt in the place of a value model
REAL_METHODS = {"dpo": "dpo", "grpo": "ppo"}
NAMES = {"dpo": "DPO", "grpo": "GRPO"}


@dataclass(frozen=True)
class RealSettings:
    """Numbers of a study of a pretrained model.

    Attributes:
        model: a folder or hub id of transformers.
        data: preference pairs, as ``fused-po train`` reads them.
        eval_data: held-out pairs; None: some prompts of ``data`` are held out.
        held_out: prompts that are held out, 128.
        reward: what answers are worth: ``module:function``, or a reward model's folder or id. Policy arms need one.
        judge: ``module:function`` that compares two answers; None: the larger reward wins.
        steps: updates of each arm, 200.
        batch: answers in an update, 64: 32 pairs of DPO.
        micro_batch: answers that are on the device at once in training, 4.
        dpo_lr: DPO's peak learning rate; None: 5e-7, with an adapter 5e-6.
        ppo_lr: that of the policy arms; None: 1e-6, with an adapter 1e-5.
        beta: DPO's, 0.1.
        epsilon: PPO's clip, 0.2.
        generations: answers to each prompt in a rollout, 8.
        iterations: updates on each rollout, 2: with one the ratio to the sampling policy is 1 throughout.
        checkpoints: models of a run that are measured, the start and the last one included, 6.
        samples: pairs, or answers, that D and D' are made of, 128.
        final: D', answers of the final model: ``greedy`` or ``sampled``.
        estimator: of G, ``directional`` or ``exact``.
        max_length: tokens of prompt and answer of a pair, 1024; longer pairs are cut.
        max_new_tokens: of an answer that is drawn, 256.
        lora: rank of an adapter that is trained in the place of the model; None: all of it is trained.
        optim: the engine's optimizer, ``adamw_torch``; ``paged_adamw_8bit`` needs bitsandbytes.
        gradient_checkpointing: layers are run again in the backward, True.
        dtype: ``bfloat16``: layers run in it, weights stay float32; ``float32``. None: bfloat16 on a GPU.
        device: ``cpu`` or ``cuda``; None: a GPU if there is one.
    """

    model: str
    data: str
    eval_data: str | None = None
    held_out: int = 128
    reward: str | None = None
    judge: str | None = None
    steps: int = 200
    batch: int = 64
    micro_batch: int = 4
    dpo_lr: float | None = None
    ppo_lr: float | None = None
    beta: float = 0.1
    epsilon: float = 0.2
    generations: int = 8
    iterations: int = 2
    checkpoints: int = 6
    samples: int = 128
    final: str = "greedy"
    estimator: str = "directional"
    max_length: int = 1024
    max_new_tokens: int = 256
    lora: int | None = None
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = True
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        low = {"batch": 2, "micro_batch": 2, "generations": 2, "checkpoints": 2, "held_out": 2, "samples": 2}
        counts = ("steps", "iterations", "max_length", "max_new_tokens")
        for name in (*low, *counts):
            if getattr(self, name) < low.get(name, 1):
                raise ValueError(f"{name} must be at least {low.get(name, 1)}: got {getattr(self, name)}")
        for name in ("dpo_lr", "ppo_lr", "beta", "epsilon"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be positive: got {value}")
        for name, choices in (("final", ("greedy", "sampled")), ("estimator", ("directional", "exact"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}: got {getattr(self, name)!r}")
        if self.micro_batch % 2 or self.batch % self.micro_batch:
            raise ValueError(
                f"batch must be a multiple of micro_batch, and that even: got {self.batch} and {self.micro_batch}"
            )
        if self.batch % self.generations:
            raise ValueError(f"batch must be a multiple of generations, {self.generations}: got {self.batch}")
        if self.checkpoints > self.steps + 1:
            raise ValueError(f"checkpoints must be at most steps + 1, {self.steps + 1}: got {self.checkpoints}")
        if self.max_new_tokens >= self.max_length:
            raise ValueError(f"max_new_tokens must be below max_length, {self.max_length}: got {self.max_new_tokens}")

    @property
    def due(self) -> list[int]:
        """The updates after which a model is kept, 0 first."""
        last = self.checkpoints - 1
        return sorted({round(self.steps * index / last) for index in range(self.checkpoints)})

    def lr(self, method: str) -> float:
        """The peak learning rate of a method."""
        given, full = (self.dpo_lr, 5e-7) if method == "dpo" else (self.ppo_lr, 1e-6)
        if given is not None:
            return given
        return full if self.lora is None else 10 * full

    def placed(self) -> RealSettings:
        """With the device and dtype of the machine at hand where none is given.

        Raises:
            ValueError: a device that is not there.
        """
        from fused_po.trainers.loading import device_of

        found = device_of(self.device)
        dtype = self.dtype or ("bfloat16" if found.type == "cuda" else "float32")
        return replace(self, device=str(found), dtype=dtype)

    def words(self, methods: list[str]) -> list[str]:
        """What will be trained, in sentences."""
        trained = "all weights" if self.lora is None else f"a LoRA adapter of rank {self.lora}"
        engine = f"{self.optim}, linear decay after a tenth of warm-up"
        found = [
            f"{trained} of {self.model}, {self.steps} updates of {self.batch} answers, {self.micro_batch} at a time, "
            f"in {self.dtype or 'bfloat16 on a GPU'} over float32 weights; {engine}"
            + ("; gradient checkpointing" if self.gradient_checkpointing else "")
        ]
        if "dpo" in methods:
            found.append(f"DPO: beta {self.beta:g}, learning rate {self.lr('dpo'):g}, reference: the start")
        if "grpo" in methods:
            found.append(
                f"GRPO (TRL): clip {self.epsilon:g}, learning rate {self.lr('grpo'):g}, {self.generations} answers to "
                f"a prompt, {self.iterations} updates on each rollout, reward {self.reward}"
            )
        found.append(
            f"measured after {', '.join(map(str, self.due))} updates, on {self.held_out} held-out prompts; G with "
            f"{self.samples} pairs or answers as D, {self.samples} {self.final} answers of the final model as D'"
        )
        return found

    def decisive(self) -> dict[str, Any]:
        """What decides the numbers of an arm, and must be the same where it goes on, or is pooled."""
        found = asdict(self)
        for name in ("device", "dtype", "data", "eval_data"):
            del found[name]
        return found


def arms_of(method: str) -> dict[str, Split | None]:
    """arm -> split, of a method: those of the small study that differ in nothing else."""
    return {name: arm.split for name, arm in ARMS[REAL_METHODS[method]].items() if not arm.kl}


def folder_of(seed: int, method: str, arm: str) -> str:
    """Where a run stands in the output folder."""
    return f"seed-{seed}/{method}/{arm.replace(' ', '-')}"
