"""``fused-po g``: G of a training run, over its checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_po.cli.arguments import positive
from fused_po.cli.progress import Watch, watched
from fused_po.trainers import whole

if TYPE_CHECKING:
    from fused_po.cli.g_data import Data
    from fused_po.diagnostics.rollouts import Rollout

__all__ = ["add_parser"]

PARTS = ("sides", "thirds", "layers", "no_reweighting")
# what must not change between a measurement and its continuation
_FIXED = (
    *("checkpoints", "data", "final", "draws", "loss", "beta", "loss_arg", "parts", "method", "reference", "examples"),
    *("prompts", "batch_size", "max_length", "max_new_tokens", "dtype", "lora_only", "seed"),
)
# seconds between two looks for what another process makes
_LOOK = 1.0
_EPILOG = """\
G(L) is the inner product of two gradients at a checkpoint: that of the loss L on D (--data), and that of the negative
log-likelihood of D', answers of the last checkpoint (--final). Above 0: a step on the loss makes these answers more
likely. --data is read as fused-po train reads it, or is a file of rollouts (docs/g.md). The first checkpoint is the
reference unless --reference names another model. Each checkpoint is written as it is measured; --resume goes on. Under
torchrun each process takes checkpoints of its own.
"""


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser("g", help="G over the checkpoints of your own run", epilog=_EPILOG)
    add = parser.add_argument
    add("--checkpoints", nargs="+", required=True, metavar="DIR", help="folders of models or adapters, of one run")
    add("--data", required=True, help="D: preferences as in fused-po train, or a JSONL file of rollouts")
    add("--final", default="greedy", help="D': greedy (default) or sampled from the last checkpoint, or a FILE")
    add("--draws", type=positive(int), default=4, help="of D' where it is sampled: averaged, spread shown; default 4")
    add("--loss", default="sigmoid", help="a registered loss, default sigmoid (DPO); several: sigmoid+sft")
    add("--beta", type=float, help="the loss's beta, default its own")
    add("--loss-arg", action="append", default=[], metavar="NAME=VALUE", help="another hyper-parameter; repeatable")
    add("--parts", default="sides,thirds", help=f"of G, some of {','.join(PARTS)}; default sides,thirds")
    add("--method", choices=("directional", "exact"), default="directional", help="default directional")
    add("--reference", metavar="MODEL", help="folder or hub id; default: the first checkpoint")
    add("--examples", type=positive(int), default=64, metavar="N", help="rows of --data, drawn once; default 64")
    add("--prompts", type=positive(int), default=32, metavar="N", help="of them for D', default 32")
    add("--batch-size", type=positive(int), default=8, metavar="N", help="answers at once, default 8")
    add("--max-length", type=positive(int), default=1024, help="tokens of prompt and answer together, default 1024")
    add("--max-new-tokens", type=positive(int), default=128, metavar="N", help="of an answer in D', default 128")
    add("--lora-only", action="store_true", help="G in the parameters of the adapter, not of the merged model")
    add("--gradient-checkpointing", action="store_true", help="activations are made again, for less memory")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 needs --method exact")
    add("--device", help="cpu or cuda; default: a GPU if there is one")
    add("--seed", type=int, default=0, help="of the rows of D and of sampling, default 0")
    add("--count-memory", action="store_true", help="count the peak of tensors too; on a CPU this is slower")
    add("--predict-only", action="store_true", help="say what memory it would take, and stop")
    add("--resume", action="store_true", help="go on with the measurement in --output")
    add("--output", type=Path, required=True, help="a new or empty folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, predict, measure, write.

    Raises:
        ValueError: whatever can't be measured, before anything is.
    """
    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; --output wants a folder")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if arguments.resume and not (output / "settings.json").is_file():
        raise ValueError(f"nothing to resume: {output} holds no measurement")
    if rank == 0 and not arguments.resume and whole.begun(output):
        raise ValueError(f"{output} exists and is not empty: choose another folder, or --resume to continue in it")
    unknown = [part for part in arguments.parts.split(",") if part not in PARTS]
    if unknown:
        raise ValueError(f"--parts {unknown[0]}: expected some of {', '.join(PARTS)}")
    if arguments.dtype == "bfloat16" and arguments.method == "directional":
        raise ValueError("--dtype bfloat16 needs --method exact: a small step is lost in parameters of 16 bits")
    # torch and transformers take seconds to import; a wrong argument should not
    with watched("loading torch", total=1.0) as watch:
        return _Measurement(arguments, rank, world, watch).go()


class _Measurement:
    """One process of the command."""

    def __init__(self, arguments: argparse.Namespace, rank: int, world: int, watch: Watch) -> None:
        import datasets
        import torch
        from transformers.utils import logging

        from fused_po.cli.g_data import check_loss, load
        from fused_po.cli.objective import loss_of
        from fused_po.diagnostics.checkpoints import check_checkpoints, config_of
        from fused_po.trainers.loading import device_of, load_tokenizer

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
        self.arguments, self.rank, self.world, self.watch = arguments, rank, world, watch
        self.output: Path = arguments.output
        self.told = False
        self.folders = sorted((Path(one).resolve() for one in arguments.checkpoints), key=_step)
        if len(set(self.folders)) < len(self.folders):
            raise ValueError("--checkpoints names a folder twice")
        vocabulary = check_checkpoints(self.folders)
        adapters = [(folder / "adapter_config.json").is_file() for folder in self.folders]
        if arguments.lora_only and not all(adapters):
            raise ValueError(f"--lora-only: {self.folders[adapters.index(False)]} holds no adapter")
        many = arguments.device in (None, "cuda") and torch.cuda.is_available()
        self.device = device_of(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if many else arguments.device)
        self.loss = loss_of(arguments)
        check_loss(self.loss, arguments.data)
        self.watch.say("reading the data")
        self.tokenizer = load_tokenizer(str(self.folders[-1]), [])
        self.vocabulary = vocabulary
        positions = getattr(config_of(self.folders[-1]).get_text_config(), "max_position_embeddings", None)
        arguments.max_length = min(arguments.max_length, positions or arguments.max_length)
        self.data: Data = load(
            arguments.data,
            self.tokenizer,
            self.loss,
            examples=arguments.examples,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            vocabulary=vocabulary,
            seed=arguments.seed,
        )
        if arguments.reference is not None and not self.data.needs_reference:
            raise ValueError(f"--reference: loss {self.loss.name!r} asks none on {arguments.data}")
        parts = arguments.parts.split(",")
        wanted = ["whole", "positive", "negative", "rest"]
        if "thirds" in parts:
            from fused_po.diagnostics.parts import PARTS as every

            wanted = list(every)
        if "no_reweighting" in parts:
            from fused_po.diagnostics.parts import FLAT

            wanted += [part + FLAT for part in wanted]
        from fused_po.diagnostics import by_layer

        self.options: dict[str, Any] = {"method": arguments.method, "parts": wanted, "cosine": True}
        self.options["blocks"] = by_layer if "layers" in parts else None
        self._check()

    def _check(self) -> None:
        """Refuse what would be refused late, before anything is written."""
        from fused_po.cli.g_models import require_model

        if self.arguments.final in ("greedy", "sampled"):
            self._prompts()
        else:
            self._final()
        if self.arguments.reference and self.data.needs_reference:
            require_model(self.arguments.reference, self.vocabulary)

    def go(self) -> int:
        """Everything, or this process's share of it."""
        arguments = self.arguments
        if self.rank == 0 and not arguments.predict_only:
            self._settle()
        while self.rank and not (self.output / "settings.json").exists():
            time.sleep(_LOOK)
        if not arguments.predict_only:
            self._say(f"{Path(arguments.data).name}: {self.data.said}")
        predicted = self._predict()
        if arguments.predict_only:
            return 0
        from fused_po.cli.g_report import described, draws_of, write

        targets = self._final()
        done = {one["checkpoint"] for one in read_points(self.output)}
        # a share of all of them: another process may have measured some by now
        own = [folder for folder in self.folders[self.rank :: self.world] if folder.name not in done]
        if self.data.needs_reference and own:
            self._refer()
        written = self.output / f"points-{self.rank}.jsonl"
        whole.begin_lines(written)
        for index, folder in enumerate(own):

            def advance(share: float, name: str = folder.name, index: int = index) -> None:
                self.watch.say(f"measuring {name}", (index + share) / len(own))

            advance(0.0)
            point = self._point(folder, targets, advance) | {"predicted_bytes": predicted}
            whole.add_line(written, point)
            left = len(own) - index - 1
            self._say(
                f"{folder.name}: G {statistics.fmean(draws_of(point, 'whole')):.4g}, {point['seconds']:.0f} s"
                + (f"; about {left * point['seconds']:.0f} s to go" if left else ""),
                every=True,
            )
        if self.rank == 0:
            while len(points := read_points(self.output)) < len(self.folders):
                self.watch.say("waiting for the other processes")
                time.sleep(_LOOK)
            order = {folder.name: place for place, folder in enumerate(self.folders)}
            points.sort(key=lambda one: order[one["checkpoint"]])
            self._say(
                write(points, self.loss.name, self.output, described(arguments, self.data, self.folders, targets))
            )
            self._say(f"wrote {self.output}/g.png, g.csv, g.md and points-*.jsonl")
        return 0

    def _say(self, text: str, every: bool = False) -> None:
        if self.rank == 0 or every:
            print(text, flush=True)

    def _settle(self) -> None:
        """Write down what is measured, or compare it with what was."""
        from fused_po.trainers.data import contents

        now = {name: getattr(self.arguments, name) for name in _FIXED}
        now["checkpoints"] = [folder.name for folder in self.folders]
        for name in ("data", "final"):
            now[name] = contents(now[name]) or now[name]
        path = self.output / "settings.json"
        if not self.arguments.resume:
            self.output.mkdir(parents=True, exist_ok=True)
            whole.write_text(path, json.dumps(now, indent=1) + "\n")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"--resume with another --{name.replace('_', '-')}: {value}, it began with {before.get(name)}"
                )

    def _load(self, folder: Path | str, merged: bool = False) -> Any:
        """A checkpoint in eval mode; ``merged``: an adapter is merged whatever is measured."""
        import torch

        from fused_po.cli.g_models import checkpointed
        from fused_po.trainers.loading import load_model

        dtype = getattr(torch, self.arguments.dtype)
        if self.arguments.lora_only and not merged:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(str(folder), is_trainable=True, dtype=torch.float32)
        else:
            # an adapter that was merged leaves all of it frozen
            model = load_model(str(folder), self.tokenizer, self.arguments.seed).requires_grad_(True)
        model = model.to(device=self.device, dtype=dtype).eval()
        return checkpointed(model) if self.arguments.gradient_checkpointing and not merged else model

    def _final(self) -> list[list[Rollout]]:
        """D', a list for each draw; made by the first process, for all."""
        from fused_po.cli.g_data import answers_of_file, drawn
        from fused_po.diagnostics.rollouts import read_rollouts, write_rollouts

        arguments = self.arguments
        if arguments.final not in ("greedy", "sampled"):
            return [answers_of_file(arguments.final, self.tokenizer, arguments.max_length, self.vocabulary)]
        path = self.output / "final.jsonl"
        count = arguments.draws if arguments.final == "sampled" else 1
        if self.rank == 0 and not path.exists():
            model, found = self._load(self.folders[-1], merged=True), []
            prompts = self._prompts()
            for draw in range(count):
                found += drawn(
                    model,
                    prompts,
                    self.tokenizer,
                    sampled=arguments.final == "sampled",
                    seed=arguments.seed + draw,
                    longest=arguments.max_new_tokens,
                    batch_size=arguments.batch_size,
                    advance=lambda done, draw=draw: self.watch.say(  # type: ignore[misc]
                        "drawing D'", (draw + done / len(prompts)) / count
                    ),
                )
            write_rollouts(whole.unfinished(path), found)
            os.replace(whole.unfinished(path), path)
        while not path.exists():
            time.sleep(_LOOK)
        found = read_rollouts(path)
        size = len(found) // count
        return [found[first : first + size] for first in range(0, len(found), size)]

    def _prompts(self) -> list[list[int]]:
        """Of D, with room for an answer."""
        room = self.arguments.max_length - self.arguments.max_new_tokens
        if room < 1:
            raise ValueError("--max-new-tokens leaves no room for a prompt within --max-length")
        return [prompt[-room:] for prompt in self.data.prompts[: self.arguments.prompts]]

    def _refer(self) -> None:
        self.watch.say("asking the reference", 0.0)
        model = self._load(self.arguments.reference or self.folders[0], merged=True)
        self.data.refer(model, lambda done: self.watch.say("asking the reference", done))

    def _target(self, rollouts: list[Rollout]) -> Any:
        # answers without a token have none that is likely or not
        kept = [replace(one, mask=None) for one in rollouts if one.answer_ids]
        return [one.to(self.device) for one in self._target_shapes(kept)]

    def _predict(self) -> int:
        from fused_po.cli.g_models import predicted
        from fused_po.diagnostics.rollouts import Rollout

        self.watch.say("predicting memory")
        if self.arguments.final in ("greedy", "sampled"):
            longest = self.arguments.max_new_tokens
            target = [Rollout(prompt, [0] * longest) for prompt in self._prompts()]
        else:
            target = self._final()[0]
        found, text = predicted(self.folders[-1], self.data, self._target_shapes(target), self.options, self.arguments)
        self._say(text)
        return found

    def _target_shapes(self, rollouts: list[Rollout]) -> Any:
        from fused_po.diagnostics.rollouts import rollout_examples

        return rollout_examples(rollouts, self.data.pad, batch_size=self.arguments.batch_size)

    def _point(self, folder: Path, targets: list[list[Rollout]], advance: Callable[[float], Any]) -> dict[str, Any]:
        """G at a checkpoint, for each draw of D'."""
        from fused_po.cli.g_models import counted, forecast
        from fused_po.diagnostics import gradient_alignment

        start = time.monotonic()
        model = self._load(folder)
        batches, draws, peak = self.data.examples(model, _step(folder)[0]), [], 0
        if not self.told:
            self.told = True
            seconds = forecast(model, batches, self._target(targets[0]), self.loss, self.options)
            self._say(f"time: about {seconds * len(targets):.0f} s a checkpoint")
        for number, rollouts in enumerate(targets, 1):
            target = self._target(rollouts)

            def measure(target: Any = target) -> Any:
                return gradient_alignment(model, batches, self.loss, target, **self.options)

            found, taken = counted(measure, model, self.arguments.count_memory)
            peak = max(peak, taken)
            g = {part: dict(blocks) for part, blocks in found.values.items()}
            cosine = {part: found.cosine(part) for part in found.values}
            scalars = {"norms": found.norms, "error": found.error, "nll": found.target_nll}
            draws.append({"g": g, "cosine": cosine, **scalars})
            advance(number / len(targets))
        point = {"checkpoint": folder.name, "step": _step(folder)[0], "draws": draws}
        return point | {"seconds": time.monotonic() - start, "peak_bytes": peak or None}


def _step(folder: Path) -> tuple[int, str]:
    """The number at the end of a folder's name, and the name."""
    digits = folder.name.rpartition("-")[2]
    return (int(digits) if digits.isdecimal() else 0), folder.name


def read_points(output: Path) -> list[dict[str, Any]]:
    """What has been measured; a last line that a kill cut short is not there."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(output.glob("points-*.jsonl")):
        for point in whole.json_lines(path):
            found[point["checkpoint"]] = point
    return list(found.values())
