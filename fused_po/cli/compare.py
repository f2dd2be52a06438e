"""``--compare``: the same step through plain PyTorch, and whether the two agree."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from fused_po import LossOutput
from fused_po.cli.report import read_log
from fused_po.diagnostics.memory import peak_memory
from fused_po.ops.plain import plain_loss, rounding
from fused_po.trainers import whole
from fused_po.trainers.averages import weighed_metrics
from fused_po.trainers.preferences import PreferenceTrainer

__all__ = ["ComparedTrainer", "Comparison"]

# a step: takes a model, runs forward and backward, returns the loss
Step = Callable[[nn.Module], Tensor]
# counting memory on a CPU slows a step down, so only these steps are counted
MEMORY_STEPS = 2
ULP = torch.finfo(torch.float32).eps
# least loss that a relative difference is taken of
LEAST_LOSS = 1e-3


class ComparedTrainer(PreferenceTrainer):
    """Takes every step through full logits too, and writes what differed to compare.jsonl; on one process."""

    comparison: Comparison | None = None

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        side, outputs = self.side_inputs(model, batch), list[LossOutput]()

        def fused(model: nn.Module) -> Tensor:
            outputs[:] = [self.loss_output(model, batch, side=side)]
            outputs[0].loss.backward()
            return outputs[0].loss.detach()

        def plain(model: nn.Module) -> Tensor:
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            # what the model returns has its own softcap and scale applied
            value = plain_loss(model(**given, use_cache=False).logits[:, :-1], batch["targets"], self.loss, **side)
            value.backward()
            return value.detach()

        log = Path(cast(str, self.args.output_dir)) / "compare.jsonl"
        if self.comparison is None:
            # a run that is continued answers for the steps before, too
            kept = [row for row in read_log(log) if row["step"] <= self.state.global_step]
            whole.write_text(log, "".join(f"{json.dumps(row)}\n" for row in kept))
            self.comparison = Comparison(fused, plain, self.args.device, rows=kept)
        self.comparison.fused, self.comparison.plain = fused, plain
        loss = self.comparison.step(
            model, self.state.global_step + 1, lambda: rounding(outputs[0].stats, batch["targets"], self.loss, **side)
        )
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.comparison.rows[-1]) + "\n")
        self._train.add(weighed_metrics(batch, outputs[0], self._paired))
        return loss

    def report(self, output: Path, console: Any) -> int:
        """Write compare.json and show it: 0, or 1 where the paths disagree."""
        if self.comparison is None:
            # a run that was killed after its last step
            rows = read_log(output / "compare.jsonl")
            if not rows:
                return 0
            never = cast(Step, None)
            self.comparison = Comparison(never, never, self.args.device, rows=rows)
        (output / "compare.json").write_text(json.dumps(self.comparison.summary(), indent=2) + "\n", encoding="utf-8")
        console.print(self.comparison.table())
        return 0 if self.comparison.agrees else 1


@dataclass
class Comparison:
    """Takes each step twice and keeps what differed.

    The judge is float64: a step agrees if the fused gradient is at most twice as far from the float64 gradient as the
    plain one, plus one ulp and what one ulp of the log-probs makes of it, and the loss likewise. It is called at the
    first step; later steps pass without it while the two paths stay within what that rule allows at the error of the
    plain path seen so far (2 + 1 times that error, plus one ulp), and are judged like the first where they do not.
    """

    fused: Step
    plain: Step
    device: torch.device
    noise: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=lambda: {"fused": [], "plain": []})

    def step(self, model: nn.Module, number: int, rounding: Callable[[], tuple[float, float]]) -> Tensor:
        """Run both paths from the same weights and random state; leaves the fused gradients on the model.

        ``rounding``, asked after the fused path, is what one ulp of the log-probs does to the loss and, relatively, to
        the coefficients of its gradient.
        """
        paths = {"plain": self.plain, "fused": self.fused}
        # neither path always profits from caches that the other warmed
        order = list(paths) if number % 2 else list(paths)[::-1]
        found = {name: self._path(paths[name], model) for name in order}
        (fused_loss, fused, fused_time), (plain_loss, plain, plain_time) = found["fused"], found["plain"]
        difference = _distance(fused, plain)
        loss_difference = abs(fused_loss - plain_loss) / max(abs(plain_loss), LEAST_LOSS)
        loss_ulp, gradient_ulp = rounding()
        slack = max(ULP * abs(plain_loss), loss_ulp), ULP + gradient_ulp
        agrees = (
            bool(self.rows)
            and difference <= 3 * self.noise + slack[1]
            and abs(fused_loss - plain_loss) <= 3 * self.noise * abs(plain_loss) + slack[0]
        )
        row = {"step": number, "loss_difference": loss_difference, "gradient_difference": difference}
        if not agrees:
            agrees = self._judge(model, (fused_loss, fused), (plain_loss, plain), slack)
            row["judged"] = 1.0
        if len(self.memory["fused"]) < MEMORY_STEPS:
            for name in order:
                model.zero_grad()
                self.memory[name].append(peak_memory(partial(paths[name], model), self.device))
        for parameter, gradient in zip(_trained(model), fused, strict=True):
            parameter.grad = gradient
        self.rows.append({**row, "fused_seconds": fused_time, "plain_seconds": plain_time, "agrees": float(agrees)})
        return torch.tensor(fused_loss, device=self.device)

    @property
    def agrees(self) -> bool:
        return all(row["agrees"] for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """What goes to compare.json: medians over steps (the first, which warms up, left out), largest differences."""
        timed = self.rows[1:] or self.rows
        seconds = {name: statistics.median(row[f"{name}_seconds"] for row in timed) for name in ("fused", "plain")}
        memory = {name: max(values, default=0) for name, values in self.memory.items()}
        return {
            "agrees": self.agrees,
            "steps": len(self.rows),
            "disagreeing_steps": [int(row["step"]) for row in self.rows if not row["agrees"]],
            "steps_judged_in_float64": int(sum(row.get("judged", 0.0) for row in self.rows)),
            "largest_loss_difference": max(row["loss_difference"] for row in self.rows),
            "largest_gradient_difference": max(row["gradient_difference"] for row in self.rows),
            "seconds": seconds,
            "time_ratio": seconds["fused"] / seconds["plain"],
            "peak_memory_bytes": memory,
            "memory_ratio": memory["fused"] / memory["plain"] if memory["plain"] else math.nan,
            "rows": self.rows,
        }

    def table(self) -> Table:
        """The comparison for people."""
        found = self.summary()
        table = Table(title=f"fused against full logits, {found['steps']} steps")
        for heading in ("", "fused", "full logits", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        seconds, memory = found["seconds"], found["peak_memory_bytes"]
        table.add_row(
            "forward + backward, median",
            *(f"{1e3 * seconds[name]:.0f} ms" for name in ("fused", "plain")),
            f"{found['time_ratio']:.2f} x",
        )
        table.add_row(
            f"peak memory of a step ({len(self.memory['fused'])} counted)",
            *(f"{memory[name] / 2**20:.0f} MiB" for name in ("fused", "plain")),
            f"{found['memory_ratio']:.2f} x",
        )
        table.add_row("largest relative difference of the loss", "", "", f"{found['largest_loss_difference']:.1e}")
        table.add_row("largest relative difference of gradients", "", "", f"{found['largest_gradient_difference']:.1e}")
        verdict = "[green]agree[/green]" if self.agrees else f"[red]disagree[/red] at {found['disagreeing_steps']}"
        table.add_row("to float32 rounding, every step", "", "", verdict)
        return table

    def _path(self, step: Step, model: nn.Module) -> tuple[float, list[Tensor], float]:
        model.zero_grad()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            _wait(self.device)
            start = time.perf_counter()
            loss = step(model)
            _wait(self.device)
            seconds = time.perf_counter() - start
        return loss.item(), _gradients(model), seconds

    def _judge(
        self,
        model: nn.Module,
        fused: tuple[float, list[Tensor]],
        plain: tuple[float, list[Tensor]],
        slack: tuple[float, float],
    ) -> bool:
        model.zero_grad()
        referee: Any = copy.deepcopy(model).double()
        if hasattr(referee, "set_experts_implementation"):
            # the grouped products of a mixture of experts know no float64
            referee.set_experts_implementation("eager")
        truth_loss = self.plain(referee).item()
        truth = _gradients(referee)
        loss_errors = [abs(loss - truth_loss) for loss, _ in (fused, plain)]
        errors = [_distance(gradients, truth) for _, gradients in (fused, plain)]
        self.noise = max(self.noise, errors[1])
        return loss_errors[0] <= 2 * loss_errors[1] + 2 * slack[0] and errors[0] <= 2 * errors[1] + slack[1]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in _trained(model)]


def _distance(got: list[Tensor], want: list[Tensor]) -> float:
    """||got - want|| / ||want|| over all parameters together."""
    pairs = list(zip(got, want, strict=True))
    apart = math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))
    size = math.sqrt(sum(b.double().square().sum().item() for _, b in pairs))
    return apart / size if size else apart


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
