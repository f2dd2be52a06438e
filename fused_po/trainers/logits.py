"""Trainers that ask a model for logits and take log-probs from them: their methods, wrapped so that none are made.

Within such a method the model's output layer returns ``DeferredLogits``, see ``seam``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import nn

from fused_po.trainers.seam import deferred
from fused_po.trainers.unmade import made

__all__ = ["PREDICTION", "Methods"]

# what it returns is gathered over ranks and handed to metrics: logits have to be there
PREDICTION = "prediction_step"


class Methods:
    """Methods of trainers that are replaced, to be put back by ``remove``.

    Args:
        options: of ``linear_token_stats``.
        count: called for each of its calls.
    """

    def __init__(self, options: Mapping[str, Any], count: Callable[[], None]) -> None:
        self._options, self._count = options, count
        self._replaced: dict[tuple[type, str], Any] = {}

    def wrap(self, trainer: type, names: tuple[str, ...]) -> None:
        """Those of the names that the class itself defines, and an inherited prediction step, once."""
        for name in names:
            own = vars(trainer).get(name)
            original = getattr(trainer, name) if name == PREDICTION else own
            if original is not None and (trainer, name) not in self._replaced:
                setattr(trainer, name, self._within(original))
                self._replaced[trainer, name] = own

    def remove(self) -> None:
        for (trainer, name), own in self._replaced.items():
            if own is None:
                delattr(trainer, name)
            else:
                setattr(trainer, name, own)
        self._replaced.clear()

    def _within(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values(), trainer.model, getattr(trainer, "ref_model", None)]
            with ExitStack() as stack:
                for model in given:
                    if isinstance(model, nn.Module):
                        stack.enter_context(deferred(model, self._options, self._count))
                found = method(trainer, *args, **kwargs)
                if method.__name__ != PREDICTION:
                    return found
                with torch.no_grad():
                    return made(found)

        return call
