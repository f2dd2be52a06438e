"""LLaMA-Factory's DPO and KTO on the fused path, by one call; nothing is changed by importing this.

::

    from fused_po.trainers import llamafactory

    llamafactory.enable()  # before llamafactory.train.tuner.run_exp(), in every process
    llamafactory.disable()

Its trainers take log-probs from full float32 logits (0.9). Here their output layer returns ``DeferredLogits``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fused_po.trainers.logits import Methods
from fused_po.trainers.switch import Enabled, Switch

__all__ = ["Enabled", "calls", "disable", "enable", "is_enabled"]

# module, trainer, and the method that calls a model
PLACES = (
    ("llamafactory.train.dpo.trainer", "CustomDPOTrainer", "concatenated_forward"),
    ("llamafactory.train.kto.trainer", "CustomKTOTrainer", "forward"),
)


def enable(*, backend: str | None = None, scratch_bytes: int | None = None) -> Enabled:
    """Let LLaMA-Factory's DPO and KTO take log-probs from ``linear_token_stats``.

    That is ``stage: dpo`` with every ``pref_loss`` (sigmoid, hinge, ipo, kto_pair, orpo, simpo), ``pref_ftx``,
    ``pref_bco_weight`` and ``ld_alpha``, and ``stage: kto``; policy and reference, full, LoRA and frozen tuning. Losses
    and metrics are LLaMA-Factory's. A head with an adapter, and a model under FSDP's first version, make their logits
    as ever, with a warning; so do the other stages. Trainers that exist already change too. Calling it again changes
    the options.

    Args:
        backend: as in ``linear_token_stats``; None: the first that supports the case.
        scratch_bytes: as there, per call.

    Returns:
        a context manager that at its end puts back what was there before the call, if used as one.

    Raises:
        ImportError: no LLaMA-Factory, or one without these methods; nothing is changed.
    """
    return _SWITCH.enable(backend=backend, scratch_bytes=scratch_bytes)


def _install(count: Callable[[], None], **options: Any) -> Callable[[], None]:
    if find_spec("llamafactory") is None:
        raise ImportError(
            "fused_po.trainers.llamafactory.enable() needs LLaMA-Factory, which is not installed: "
            "pip install llamafactory"
        )
    trainers: list[tuple[type, str]] = []
    for module, name, method in PLACES:
        trainer: Any = getattr(import_module(module), name, None)
        if method not in vars(trainer or object):
            raise ImportError(
                f"this LLaMA-Factory is not supported, it has no {module}.{name}.{method} (0.9 has): "
                "nothing was changed"
            )
        trainers.append((trainer, method))
    methods = Methods(options, count)
    for trainer, method in trainers:
        methods.wrap(trainer, (method,))
    return methods.remove


_SWITCH = Switch(_install)
disable, is_enabled, calls = _SWITCH.disable, _SWITCH.is_enabled, _SWITCH.calls
