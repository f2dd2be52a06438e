"""verl's fused functions, replaced in its modules and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from fused_po.trainers.verl import head

__all__ = ["Enabled", "calls", "disable", "enable", "is_enabled"]

DENSE = "verl.models.transformers.dense_common"
# module, name, and whether a verl without it is refused
PLACES = (
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", True),
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO", True),
    (DENSE, "forward_with_torch_backend", False),
    (DENSE, "forward_with_triton_backend", False),
)


class Enabled:
    """What ``enable`` returns; as a context it calls ``disable`` at its end."""

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        disable()


def enable(*, backend: str | None = None, scratch_bytes: int | None = None) -> Enabled:
    """Let verl's actors with ``use_fused_kernels=True`` take log-probs and entropies from ``linear_token_stats``.

    Replaced are ``linear_cross_entropy`` (``impl_backend: triton``, and Megatron's path),
    ``FusedLinearForPPO`` (``torch`` and ``liger``), and the forward that verl gives to text models, for one that heeds
    bias, softcap and logit scale. Call it in each worker before the actor's model is built: a model that has verl's
    forward already keeps it, and takes its log-probs from here all the same; one that was built meanwhile keeps ours
    after ``disable``. Calling it again changes the options.

    Args:
        backend: as in ``linear_token_stats``; None: the first that supports the case.
        scratch_bytes: as there, per call.

    Returns:
        a context manager that disables at its end, if used as one.

    Raises:
        ImportError: no verl, or one without these places; nothing is changed.
    """
    global _calls
    originals = dict(_originals) or _found()
    disable()
    _originals.update(originals)
    _calls = 0
    options: dict[str, Any] = {"backend": backend, "scratch_bytes": scratch_bytes}
    for (module, name), original in originals.items():
        _installed[module, name] = _ours(name, options)
        _replace(module, name, original, _installed[module, name])
    return Enabled()


def disable() -> None:
    """Put verl's own functions back; nothing happens where ``enable`` was not called."""
    for (module, name), original in _originals.items():
        _replace(module, name, _installed[module, name], original)
    _originals.clear()
    _installed.clear()


def is_enabled() -> bool:
    """Whether verl's fused functions are ours."""
    return bool(_originals)


def calls() -> int:
    """How many calls of verl were answered since ``enable``; 0 where it is not enabled."""
    return _calls if is_enabled() else 0


_originals: dict[tuple[str, str], Any] = {}
_installed: dict[tuple[str, str], Any] = {}
_calls = 0


def _found() -> dict[tuple[str, str], Any]:
    """verl's own functions by their places."""
    if find_spec("verl") is None:
        raise ImportError("fused_po.trainers.verl.enable() needs verl, which is not installed: pip install verl")
    found = {}
    for module, name, required in PLACES:
        try:
            found[module, name] = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            if required:
                raise ImportError(
                    f"this verl is not supported, it has no {module}.{name} (0.9 has): nothing was changed"
                ) from error
    return found


def _ours(name: str, options: dict[str, Any]) -> Any:
    """What stands in a place, counting its calls."""
    if name == "linear_cross_entropy":
        return _counted(head.linear_cross_entropy, options)
    if name == "FusedLinearForPPO":

        class Counted(head.FusedLinearForPPO):
            def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
                super().__init__(chunk_size, impl_backend, **options)

            forward = _counted(head.FusedLinearForPPO.forward, {})

        return Counted
    return _counted(head.forward_with_fused_po, {"kernel_options": options})


def _counted(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _calls
        _calls += 1
        return function(*args, **kwargs, **options)

    return call


def _replace(module: str, name: str, old: Any, new: Any) -> None:
    """Put ``new`` where ``old`` was: in its module, and in those of verl that imported the name from there."""
    loaded = [found for key, found in list(sys.modules.items()) if key.partition(".")[0] == "verl"]
    for one in [sys.modules[module], *loaded]:
        if getattr(one, "__dict__", {}).get(name) is old:
            setattr(one, name, new)
