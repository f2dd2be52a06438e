"""What README.md and docs/operations.md show runs, and prints what they say."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_po import losses, splits
from fused_po.losses import registry
from fused_po.ops.coefficients import coefficients
from tests.forked import python
from tests.losses.cases import make_batch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# the loss of one's own is a file of its own
OWN = "cli.main()"
# the README says that TRL is optional
OPTIONAL = "trainers import trl"


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page) if kind == language]


def run(folder: Path, *arguments: str) -> str:
    done = python(*arguments, cwd=folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def own_loss() -> str:
    (found,) = [block for block in blocks(README, "python") if OWN in block]
    return found


def test_the_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: its snippet is not run")
    snippets = [block for block in [*blocks(README, "python"), *blocks(OPERATIONS, "python")] if OWN not in block]
    assert len(snippets) >= 10 and any(OPTIONAL in block for block in snippets)
    # the usual loop and the fused one agree
    seed, compare = "import torch\ntorch.manual_seed(0)\n", "usual = loss.item()\n"
    usual = next(index for index, block in enumerate(snippets) if "def summed_logp" in block)
    snippets.insert(usual + 1, compare)
    snippets.insert(usual + 3, "assert abs(out.loss.item() - usual) < 1e-5\n")
    (tmp_path / "script.py").write_text(seed + "\n".join(snippets), encoding="utf-8")
    printed = run(tmp_path, "script.py")
    (said,) = blocks(OPERATIONS, "text")
    assert said in printed


def test_a_loss_of_ones_own_trains(tmp_path: Path, own_loss: str) -> None:
    (command,) = [line for block in blocks(README, "bash") for line in block.splitlines() if "my_loss.py" in line]
    (tmp_path / "my_loss.py").write_text(own_loss, encoding="utf-8")
    python, *arguments = shlex.split(command, comments=True)
    assert python == "python"
    arguments[arguments.index("--steps") + 1] = "2"
    assert "agree" in run(tmp_path, *arguments)


def commands() -> list[list[str]]:
    """The lines of the README that start with ``fused-po``."""
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fused-po ")]


# in the place of what the README leaves open, and for less of it; the rest stays as it is shown
SMALLER = {
    "doctor": [],
    "train": ["--steps", "2", "--output", "run"],
    "bench": ["--cases", "T512-H128-V2000*", "--methods", "linear_loss", "eager", "--seconds", "0.01"],
    "bench --paper": ["--cases", "dapo-small"],
    "profile": ["--lengths", "1024", "65536"],
}


def test_the_commands_run(tmp_path: Path) -> None:
    """All but the study and G over a run, which their own tests run."""
    rows = [f'{{"prompt": "Say {word}.", "chosen": "{word}", "rejected": "no"}}' for word in ("one", "two", "six")]
    (tmp_path / "preferences.jsonl").write_text("\n".join(rows), encoding="utf-8")
    shown = commands()
    assert {words[0] for words in shown} == {"doctor", "train", "bench", "profile", "study", "g"}
    ran = set()
    for words in shown:
        name = " ".join(words[:2]) if words[1:2] == ["--paper"] else words[0]
        if name in ("study", "g"):
            continue
        words = ["tiny" if word == "PATH_OR_ID" else word for word in words]
        printed = run(tmp_path, "-m", "fused_po", *words, *SMALLER[name])
        assert len(printed.splitlines()) > 3, name
        ran.add(name)
    assert ran == set(SMALLER)
    assert (tmp_path / "profile" / "profile.png").exists() and (tmp_path / "run" / "model").is_dir()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Import a snippet that registers a loss; other tests know all losses, so it is gone afterwards."""

    def run_module(text: str) -> None:
        monkeypatch.setattr(registry, "_registry", dict(registry._registry))
        module = ModuleType("snippet")
        # dataclasses look their module up
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(text, vars(module))

    return run_module


def test_a_loss_of_ones_own_is_what_it_says(own_loss: str, load: Callable[[str], None]) -> None:
    """Under a split that takes the negative side away, and with the coefficients of the pattern that it may have."""
    load(own_loss)
    loss = losses.create("margin_to_target", target=5.0)
    stats, batch, _ = make_batch(loss, [3, 5])
    value, whole = coefficients(loss, stats, batch)
    assert loss.pattern(batch) is None and "`def pattern(self, batch): return self.role(batch)`" in README
    ratio = whole.logp / loss.role(batch)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert value > 0 and ratio[0] < 0
    _, split = coefficients(loss, stats, batch, splits.positive_only())
    torch.testing.assert_close(split.logp, torch.where(batch.chosen, whole.logp, 0.0))


def test_the_loss_of_contributing_is_what_it_says(load: Callable[[str], None]) -> None:
    (text,) = blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
    load(text)
    loss = losses.create("squared_hinge")
    stats, batch, _ = make_batch(loss, [3, 5])
    value, found = coefficients(loss, stats, batch)
    hinge, _ = coefficients(losses.create("hinge"), stats, batch)
    torch.testing.assert_close(value, hinge.square())
    torch.testing.assert_close(found.logp, -2 * hinge * 0.1 * loss.pattern(batch))
