"""``fused-po doctor``: which backends run here, why the others do not, and whether those that run are right."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import time
from importlib import metadata
from typing import Any

from fused_po.cli.progress import watched

__all__ = ["add_parser"]

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "peft", "numpy", "trl", "liger-kernel")
_EPILOG = """\
Each available backend is held to the accuracy rule of this project on small cases: an error to float64 of at most twice
that of plain PyTorch. The exit status is 1 if one fails. On a machine with a GPU and nvcc, the first run compiles.
"""


def add_parser(commands: Any) -> None:
    """Add the command to ``argparse`` subparsers."""
    parser = commands.add_parser(
        "doctor", help="which backends run on this machine, and are they right", epilog=_EPILOG
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine and print.

    Returns:
        0, or 1 if a backend that is available fails its self-test.
    """
    with watched("examining the backends"):
        report = examine()
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0 if all(backend["passed"] is not False for backend in report["backends"].values()) else 1


def examine() -> dict[str, Any]:
    """All that the command prints.

    Returns:
        ``backends`` by name, each with ``available``, ``reason`` (why not), ``passed`` (None if not available),
        ``checks`` and ``seconds``; ``gpus``; ``cuda``; ``extension``; ``versions``.
    """
    import torch

    from fused_po.kernels.select import BACKENDS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = {name: _try(name, device) for name in BACKENDS}
    return {
        "device": device,
        "backends": backends,
        "gpus": _gpus(),
        "cuda": _cuda(),
        "extension": _extension(),
        "versions": _versions(),
    }


def _try(name: str, device: str) -> dict[str, Any]:
    import torch

    from fused_po.kernels.select import unsupported
    from fused_po.testing import self_test

    found: dict[str, Any] = {"available": False, "reason": None, "passed": None, "checks": [], "seconds": None}
    found["reason"] = unsupported(name, "row_stats", torch.zeros(1, 8, device=device))
    if found["reason"] is not None:
        return found
    found["available"] = True
    start = time.perf_counter()
    try:
        checks = self_test(name, device)
    except Exception as error:
        # whatever it is, it is what the user came to see
        return found | {"passed": False, "reason": f"the self-test failed: {type(error).__name__}: {error}"}
    found["seconds"] = round(time.perf_counter() - start, 3)
    found["checks"] = [{"what": c.what, "error": c.error, "bound": c.bound, "passed": c.passed} for c in checks]
    wrong = [c.what for c in checks if not c.passed]
    reason = f"over the bound: {', '.join(wrong)}" if wrong else None
    return found | {"passed": not wrong, "reason": reason}


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    return found


def _cuda() -> dict[str, Any]:
    import torch

    from fused_po.kernels.build import BuildError, Toolkit

    try:
        toolkit = Toolkit.find()
        nvcc = f"{toolkit.version} ({toolkit.nvcc})"
    except BuildError as error:
        nvcc = str(error)
    return {"driver": _driver(), "of_torch": torch.version.cuda, "nvcc": nvcc}


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    call = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(call, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = run.stdout.split()
    return lines[0] if lines else None


def _extension() -> dict[str, Any]:
    """Where the CUDA extension came from and how it was built; without a GPU, what a build would need."""
    from fused_po.kernels import jit
    from fused_po.kernels.build import BuildError, find_sources
    from fused_po.kernels.cuda import extension

    module, reason = extension()
    sources = find_sources()
    try:
        cache = str(jit.cache_folder())
    except BuildError as error:
        cache = str(error)
    return {
        "loaded_from": getattr(module, "__file__", None),
        "reason": reason,
        "build": None if module is None else {name: str(value) for name, value in module.build_info().items()},
        "architectures": [] if module is None else list(module.architectures()),
        "sources": None if sources is None else str(sources),
        "cache_folder": cache,
    }


def _versions() -> dict[str, str | None]:
    import fused_po

    found: dict[str, str | None] = {"fused_po": fused_po.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("backend", "state", "worst of the self-test: error, bound", title=f"Backends on {report['device']}")
    for name, backend in report["backends"].items():
        if not backend["available"]:
            table.add_row(name, "not available", escape(backend["reason"]))
            continue
        state = "[green]passed[/]" if backend["passed"] else "[red]FAILED[/]"
        if backend["checks"]:
            # nan is the worst there is
            worst = max(backend["checks"], key=lambda c: (not c["passed"], c["error"] / max(c["bound"], 1e-300)))
            words = f"{worst['error']:.2g}, {worst['bound']:.2g}: {worst['what']}; {backend['seconds']:.2f} s"
        else:
            words = backend["reason"]
        table.add_row(name, state, escape(words))
    console.print(table)
    facts = Table(show_header=False, title="Machine")
    for gpu in report["gpus"]:
        memory = gpu["memory_bytes"] / 2**30
        facts.add_row("GPU", escape(f"{gpu['name']}, compute capability {gpu['capability']}, {memory:.0f} GiB"))
    if not report["gpus"]:
        facts.add_row("GPU", "none that torch sees")
    cuda, extension = report["cuda"], report["extension"]
    facts.add_row("driver", escape(cuda["driver"] or "none found"))
    facts.add_row("CUDA of torch", cuda["of_torch"] or "none, a CPU build")
    facts.add_row("nvcc", escape(cuda["nvcc"]))
    facts.add_row("CUDA extension", escape(extension["loaded_from"] or f"not loaded: {extension['reason']}"))
    for name, value in (extension["build"] or {}).items():
        facts.add_row(f"  {name}", escape(value))
    facts.add_row("  architectures", escape(", ".join(extension["architectures"]) or "none"))
    facts.add_row("  sources", escape(extension["sources"] or "not there"))
    facts.add_row("  cache folder", escape(extension["cache_folder"]))
    facts.add_row("versions", escape(", ".join(f"{k} {v or 'not installed'}" for k, v in report["versions"].items())))
    console.print(facts)
