"""The plugin of Axolotl, loaded from its name as Axolotl does."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed: the plugin is not run")
from fused_po.trainers import trl


@pytest.fixture
def plugin(monkeypatch):
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})
    monkeypatch.delitem(sys.modules, "fused_po.trainers.axolotl", raising=False)
    yield import_module("fused_po.trainers.axolotl").FusedPOPlugin()
    trl.disable()
    sys.modules.pop("fused_po.trainers.axolotl", None)


def test_runs_with_rewards_or_preferences_are_fused(plugin):
    plugin.pre_model_load(SimpleNamespace(rl="dpo"))
    assert trl.is_enabled()


def test_other_runs_are_left_alone(plugin):
    plugin.pre_model_load(SimpleNamespace(rl=None))
    assert not trl.is_enabled()


def test_without_it_one_sentence_says_so():
    code = "try:\n    import fused_po.trainers.axolotl\nexcept ImportError as error:\n    print(error)\n"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "fused_po.trainers.axolotl needs Axolotl, which is not installed: pip install axolotl\n"
