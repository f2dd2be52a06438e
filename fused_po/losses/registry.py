"""Losses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import TypeVar

from fused_po.losses.contract import Loss, check_declared, listed, meant
from fused_po.losses.mixture import Mixture

__all__ = ["create", "names", "register"]

# what people call losses that have TRL's name here
OTHER_NAMES = {"dpo": "sigmoid", "cdpo": "conservative", "slic": "hinge", "sppo": "sppo_hard", "exo": "exo_pair"}

# what an annotation of a hyper-parameter asks for
_WORDS: dict[str, tuple[type, str]] = {
    "float": (Real, "a number"),
    "int": (Integral, "a whole number"),
    "bool": (bool, "True or False"),
    "str": (str, "a word"),
}

_registry: dict[str, type[Loss]] = {}

LossClass = TypeVar("LossClass", bound=type[Loss])


def register(name: str) -> Callable[[LossClass], LossClass]:
    """Class decorator: make a loss available as ``create(name)``.

    Raises:
        ValueError: a name that is taken, or a class that declares an unknown horizon, statistic or side input.
    """

    def add(cls: LossClass) -> LossClass:
        if name in _registry:
            raise ValueError(f"loss {name!r} is registered already")
        cls.name = name
        check_declared(cls)
        _registry[name] = cls
        return cls

    return add


def names() -> tuple[str, ...]:
    """The registered losses, sorted."""
    return tuple(sorted(_registry))


def create(
    name: str | Sequence[str], *, loss_weights: Sequence[float] | None = None, **hyperparameters: object
) -> Loss:
    """Make a loss by name, or a weighted sum of several as TRL's ``loss_type`` list does.

    Args:
        name: one of ``names()``, or a list of them.
        loss_weights: a weight for each name of a list; default all 1.
        hyperparameters: numbers and words named as in TRL; see the loss's docstring for defaults. In a list each loss
            takes those that it has (so WPO's ``use_weighting`` leaves ``sft`` alone, where TRL fails), and ``sft``
            beside pairwise losses learns the chosen half.

    Raises:
        ValueError: an unknown name, an unknown hyper-parameter, a value outside its range, weights that do not match.
    """
    if isinstance(name, str):
        if loss_weights is not None:
            raise ValueError("loss_weights weights a list of losses: got one name")
        _refuse_unknown(f"loss {name!r}", _known(name), hyperparameters)
        _check_types(_registry[name], hyperparameters)
        made = _registry[name](**hyperparameters)
        # what a property says is known now
        check_declared(made)
        return made
    if not isinstance(name, Sequence) or not name:
        raise ValueError(f"a loss is a name, or a list of names that is not empty: got {name!r}")
    chosen = list(name)
    known = {one: _known(one) for one in chosen}
    _refuse_unknown(f"none of the losses {listed(known)}", frozenset().union(*known.values()), hyperparameters)
    for one, options in known.items():
        _check_types(_registry[one], {key: value for key, value in hyperparameters.items() if key in options})
    paired = {"paired": True} if set(chosen) != {"sft"} else {}
    given = [{**paired, **hyperparameters} for _ in chosen]
    parts = [
        _registry[one](**{key: value for key, value in options.items() if key in known[one]})
        for one, options in zip(chosen, given, strict=True)
    ]
    for part in parts:
        check_declared(part)
    return Mixture(tuple(parts), tuple([1.0] * len(parts) if loss_weights is None else loss_weights))


def _known(name: str) -> frozenset[str]:
    if name not in _registry:
        if name in OTHER_NAMES:
            hint = f" ({OTHER_NAMES[name]!r} is that loss)"
        else:
            hint = meant([name], [*_registry, *OTHER_NAMES])
        raise ValueError(f"unknown loss {name!r}{hint}: expected one of {', '.join(names())}")
    return frozenset(field.name for field in fields(_registry[name]) if field.init)


def _refuse_unknown(who: str, known: frozenset[str], given: dict[str, object]) -> None:
    unknown = frozenset(given) - known
    if unknown:
        hint = meant(unknown, known)
        raise ValueError(f"{who} has no hyper-parameter {listed(unknown)}{hint}; it has {listed(known) or 'none'}")


def _check_types(cls: type[Loss], given: dict[str, object]) -> None:
    """Hyper-parameters are plain numbers, words and switches: a tensor would have to be read in every step."""
    annotations = {field.name: str(field.type) for field in fields(cls)}
    for name, value in given.items():
        wanted = annotations[name].removesuffix(" | None")
        if wanted not in _WORDS or (value is None and wanted != annotations[name]):
            continue
        kind, words = _WORDS[wanted]
        if not isinstance(value, kind) or (isinstance(value, bool) and wanted != "bool"):
            optional = " or None" if wanted != annotations[name] else ""
            raise ValueError(f"{name} must be {words}{optional}: got {value!r}")
