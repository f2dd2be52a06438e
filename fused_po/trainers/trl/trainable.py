"""What a trainer trains: never nothing, and the same whatever is asked of the reference on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Trainable", "flags_kept"]


@contextmanager
def flags_kept(model: torch.nn.Module) -> Iterator[None]:
    """``requires_grad`` of every parameter is afterwards what it was.

    PEFT's ``set_adapter``, by which TRL goes to a reference adapter and back, makes the adapter that it comes back to
    trainable, one that was frozen, or partly so, too.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


class Trainable:
    """Of a trainer of TRL, put before it."""

    # of transformers' trainer
    model: Any
    optimizer: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: an optimizer without a parameter: nothing would be trained, and nothing would say so.
        """
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not any(group["params"] for group in self.optimizer.param_groups):
            raise ValueError(
                "nothing is trained: no parameter of the model requires a gradient. An adapter from "
                "PeftModel.from_pretrained is frozen unless is_trainable=True"
            )
        return made

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """As in TRL; the policy's adapter is trainable afterwards if it was before."""
        with flags_kept(self.model):
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]
