"""verl's fused functions, replaced in its modules and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fused_po.trainers.switch import Enabled, Switch
from fused_po.trainers.verl import head

__all__ = ["Enabled", "calls", "disable", "enable", "is_enabled"]

DENSE = "verl.models.transformers.dense_common"
# sets the forward of a model's class
PATCH = "patch_forward_with_backends"
# module, name, and whether a verl without it is refused
PLACES = (
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", True),
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO", True),
    (DENSE, "forward_with_torch_backend", False),
    (DENSE, "forward_with_triton_backend", False),
    ("verl.models.transformers.monkey_patch", PATCH, False),
)


def _install(count: Callable[[], None], **options: Any) -> Callable[[], None]:
    originals = _found()
    ours = {place: _counting(count, place[1], options) for place in originals if place[1] != PATCH}
    ours |= {place: _noting(original) for place, original in originals.items() if place[1] == PATCH}
    for place, original in originals.items():
        _replace(*place, original, ours[place])

    def remove() -> None:
        for place, original in originals.items():
            _replace(*place, ours[place], original)

    return remove


_SWITCH = Switch(_install)
disable, is_enabled, calls = _SWITCH.disable, _SWITCH.is_enabled, _SWITCH.calls


def enable(*, backend: str | None = None, scratch_bytes: int | None = None) -> Enabled:
    """Let verl's actors with ``use_fused_kernels=True`` take log-probs and entropies from ``linear_token_stats``.

    Replaced are ``linear_cross_entropy`` (``impl_backend: triton``, and Megatron's path),
    ``FusedLinearForPPO`` (``torch`` and ``liger``), and the forward that verl gives to text models, for one that runs
    the model's own. Call it in each worker before the actor's model is built: a model that has verl's forward already
    keeps it, and takes its log-probs from here all the same; one that was built meanwhile keeps ours after
    ``disable``. Calling it again changes the options.

    Args:
        backend: as in ``linear_token_stats``; None: the first that supports the case.
        scratch_bytes: as there, per call.

    Returns:
        a context manager that at its end puts back what was there before the call, if used as one.

    Raises:
        ImportError: no verl, or one without these places; nothing is changed.
    """
    return _SWITCH.enable(backend=backend, scratch_bytes=scratch_bytes)


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


def _counting(count: Callable[[], None], name: str, options: dict[str, Any]) -> Any:
    """What stands in a place, counting its calls."""

    def counted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs, **options)

        return call

    if name == "linear_cross_entropy":
        return counted(head.linear_cross_entropy, **options)
    if name == "FusedLinearForPPO":

        class Counted(head.FusedLinearForPPO):
            def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
                super().__init__(chunk_size, impl_backend, **options)

            forward = counted(head.FusedLinearForPPO.forward)

        return Counted
    return counted(head.forward_with_fused_po, kernel_options=options)


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl's function, before which the forward that the model's class has is remembered."""

    @wraps(original)
    def patch(model: Any, *args: Any, **kwargs: Any) -> Any:
        head.note_forward(type(model))
        return original(model, *args, **kwargs)

    return patch


def _replace(module: str, name: str, old: Any, new: Any) -> None:
    """Put ``new`` where ``old`` was: in its module, and in those of verl that imported the name from there."""
    loaded = [found for key, found in list(sys.modules.items()) if key.partition(".")[0] == "verl"]
    for one in [sys.modules[module], *loaded]:
        if getattr(one, "__dict__", {}).get(name) is old:
            setattr(one, name, new)
