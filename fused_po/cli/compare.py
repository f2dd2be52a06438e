"""``--compare``: the same step through plain PyTorch, and whether the two agree."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fused_po import LossOutput
from fused_po.diagnostics.memory import peak_memory
from fused_po.ops.plain import plain_loss, rounding
from fused_po.trainers import whole
from fused_po.trainers.averages import weighed_metrics
from fused_po.trainers.preferences import PreferenceTrainer, trained

__all__ = ["ComparedTrainer"]

# counting memory on a CPU slows a step down, so only these steps are counted
MEMORY_STEPS = 2
ULP = torch.finfo(torch.float32).eps
# least loss that a relative difference is taken of
LEAST_LOSS = 1e-3


class Taken(NamedTuple):
    """A step that was taken on one of the paths."""

    loss: Tensor
    gradients: list[Tensor]
    seconds: float


class ComparedTrainer(PreferenceTrainer):
    """Takes every step through full logits too; on one process. What differed goes into ``state.log_history``.

    The judge is float64: a step agrees if the fused gradient is at most twice as far from the float64 gradient as the
    plain one, plus one ulp and what one ulp of the log-probs makes of it, and the loss likewise. It is called at the
    first step; later steps pass without it while the two paths stay within what that rule allows at the error of the
    plain path seen so far (2 + 1 times that error, plus one ulp), and are judged like the first where they do not.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # of the plain path's gradients, where it was judged
        self.noise: float | None = None
        self.memory: dict[str, list[int]] = {"fused": [], "plain": []}

    @property
    def compared(self) -> list[dict[str, float]]:
        """The steps so far, those before a continuation too."""
        history: list[dict[str, Any]] = self.state.log_history
        return [logs["compared"] for logs in history if "compared" in logs]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run both paths from the same weights and random state; leaves the fused gradients on the model."""
        model.train()
        batch = self._prepare_inputs(inputs)
        side, outputs = self.side_inputs(model, batch), list[LossOutput]()

        def fused(model: nn.Module) -> Tensor:
            outputs[:] = [self.loss_output(model, batch, side=side)]
            return outputs[0].loss

        def plain(model: nn.Module) -> Tensor:
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            # what the model returns has its own softcap and scale applied
            return plain_loss(model(**given, use_cache=False).logits[:, :-1], batch["labels"], self.loss, **side)

        paths, number = {"fused": fused, "plain": plain}, self.state.global_step + 1
        # neither path always profits from caches that the other warmed
        order = sorted(paths, reverse=number % 2 == 1)
        taken = {name: self._taken(paths[name], model) for name in order}
        mine, theirs = taken["fused"], taken["plain"]
        # what one ulp of the log-probs makes of the loss and, relatively, of the coefficients of its gradient
        loss_ulp, gradient_ulp = rounding(outputs[0].stats, batch["labels"], self.loss, **side)
        apart, size = abs(mine.loss.item() - theirs.loss.item()), abs(theirs.loss.item())
        slack = max(ULP * size, loss_ulp), ULP + gradient_ulp
        difference = distance(mine.gradients, theirs.gradients)
        row = {"step": number, "loss_difference": apart / max(size, LEAST_LOSS), "gradient_difference": difference}
        row |= {f"{name}_seconds": one.seconds for name, one in taken.items()}
        close = self.noise is not None and difference <= 3 * self.noise + slack[1]
        if self.noise is None or not close or apart > 3 * self.noise * size + slack[0]:
            row |= {"judged": 1.0, "agrees": float(self._judged(model, plain, mine, theirs, slack))}
        else:
            row |= {"agrees": 1.0}
        if len(self.memory["fused"]) < MEMORY_STEPS:
            for name in order:
                model.zero_grad()
                self.memory[name].append(peak_memory(partial(self._taken, paths[name], model), self.args.device))
        for parameter, gradient in zip(trained(model), mine.gradients, strict=True):
            parameter.grad = gradient
        cast(list[Any], self.state.log_history).append({"step": number, "compared": row})
        self._train.add(weighed_metrics(batch, outputs[0], self._paired))
        return mine.loss

    def _taken(self, path: Callable[[nn.Module], Tensor], model: nn.Module) -> Taken:
        device = self.args.device
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
        model.zero_grad()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            wait(device)
            start = time.perf_counter()
            loss = path(model)
            loss.backward()
            wait(device)
            seconds = time.perf_counter() - start
        return Taken(loss.detach(), gradients(model), seconds)

    def _judged(
        self,
        model: nn.Module,
        plain: Callable[[nn.Module], Tensor],
        mine: Taken,
        theirs: Taken,
        slack: tuple[float, float],
    ) -> bool:
        model.zero_grad()
        referee: Any = copy.deepcopy(model).double()
        if hasattr(referee, "set_experts_implementation"):
            # the grouped products of a mixture of experts know no float64
            referee.set_experts_implementation("eager")
        truth = self._taken(plain, referee)
        loss_errors = [abs(one.loss.item() - truth.loss.item()) for one in (mine, theirs)]
        errors = [distance(one.gradients, truth.gradients) for one in (mine, theirs)]
        self.noise = max(self.noise or 0.0, errors[1])
        return loss_errors[0] <= 2 * loss_errors[1] + 2 * slack[0] and errors[0] <= 2 * errors[1] + slack[1]

    def summary(self) -> dict[str, Any]:
        """What goes to compare.json: medians over steps (the first, which warms up, left out), largest differences."""
        rows, memory = self.compared, {name: max(values, default=0) for name, values in self.memory.items()}
        seconds = {name: statistics.median(row[f"{name}_seconds"] for row in rows[1:] or rows) for name in memory}
        disagreeing = [int(row["step"]) for row in rows if not row["agrees"]]
        return {
            "agrees": not disagreeing,
            "steps": len(rows),
            "disagreeing_steps": disagreeing,
            "steps_judged_in_float64": int(sum(row.get("judged", 0.0) for row in rows)),
            "largest_loss_difference": max(row["loss_difference"] for row in rows),
            "largest_gradient_difference": max(row["gradient_difference"] for row in rows),
            "seconds": seconds,
            "time_ratio": seconds["fused"] / seconds["plain"],
            "peak_memory_bytes": memory,
            "memory_ratio": memory["fused"] / memory["plain"] if memory["plain"] else math.nan,
            "rows": rows,
        }

    def report(self, output: Path, console: Console) -> int:
        """Write compare.json and show it: 0, or 1 where the paths disagree."""
        if not self.compared:
            return 0
        found = self.summary()
        whole.write_text(output / "compare.json", json.dumps(found, indent=2) + "\n")
        table = Table(title=f"fused against full logits, {found['steps']} steps")
        for heading in ("", "fused", "full logits", "ratio"):
            table.add_column(heading, justify="right" if heading else "left")
        times = (f"{1e3 * found['seconds'][name]:.0f} ms" for name in self.memory)
        sizes = (f"{found['peak_memory_bytes'][name] / 2**20:.0f} MiB" for name in self.memory)
        counted = len(self.memory["fused"])
        table.add_row("forward + backward, median", *times, f"{found['time_ratio']:.2f} x")
        table.add_row(f"peak memory of a step ({counted} counted)", *sizes, f"{found['memory_ratio']:.2f} x")
        table.add_row("largest relative difference of the loss", "", "", f"{found['largest_loss_difference']:.1e}")
        table.add_row("largest relative difference of gradients", "", "", f"{found['largest_gradient_difference']:.1e}")
        wrong = found["disagreeing_steps"]
        verdict = f"[red]disagree[/red] at {wrong}" if wrong else "[green]agree[/green]"
        table.add_row("to float32 rounding, every step", "", "", verdict)
        console.print(table)
        return 1 if wrong else 0


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in trained(model)]


def distance(got: list[Tensor], want: list[Tensor]) -> float:
    """||got - want|| / ||want|| over all parameters together."""
    pairs = list(zip(got, want, strict=True))
    apart = math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))
    size = math.sqrt(sum(b.double().square().sum().item() for _, b in pairs))
    return apart / size if size else apart
