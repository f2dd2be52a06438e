"""Checks of arguments: each failure says what was got and what was wanted."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from fused_po.losses.contract import meant
from fused_po.ops.devices import has_values
from fused_po.stats import STATISTICS

__all__ = [
    "IGNORE",
    "TRACES",
    "check_cu_seqlens",
    "check_head",
    "check_labels",
    "check_main_grad",
    "check_outputs",
    "check_scalars",
    "looks_at",
    "refuse_older_traces",
    "refuse_transforms",
    "require_floating",
    "require_number",
    "require_real",
    "require_said",
    "require_tensors",
    "row_temperatures",
]

# labels with this value carry no loss
IGNORE = -100
# known before a trace, which takes no comparison of versions on older ones
TRACES = TorchVersion(torch.__version__) >= "2.13"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocab_size: int | None) -> None:
    """Shapes, dtypes and devices of hidden (B, S, H) or (N, H), weight (V, H), bias (V,), labels (B, S) or (N,).

    Raises:
        ValueError: anything that does not fit.
    """
    require_tensors(hidden=hidden, weight=weight, labels=labels)
    if bias is not None:
        require_tensors(bias=bias)
    if hidden.ndim not in (2, 3) or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "hidden must be (B, S, H) or (N, H) and labels the same without H: "
            f"got {_shape(hidden)} and {_shape(labels)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (V, H) with H = {hidden.shape[-1]}: got {_shape(weight)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) with V = {weight.shape[0]}: got {_shape(bias)}")
    if vocab_size is not None:
        require_number("vocab_size", vocab_size, whole=True)
    if vocab_size is not None and not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must lie in [1, {weight.shape[0]}], the rows of weight: got {vocab_size}")
    require_floating(hidden=hidden, weight=weight, bias=bias)
    same_device(hidden, weight=weight, bias=bias, labels=labels)


def refuse_older_traces(what: str) -> None:
    """Raise RuntimeError where a gradient would be 0: torch 2.11 hands the backward of a traced call one of 0; of 2.12
    it is not known.
    """
    if torch.compiler.is_compiling() and not TRACES and torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} under torch.compile needs torch 2.13 or later, earlier ones make its gradient 0: leave it out "
            "of what is compiled (torch.compiler.disable), or take token_stats"
        )


def refuse_transforms(what: str) -> None:
    """Raise RuntimeError inside ``torch.func``'s transforms: an operation makes its gradient itself, and once."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{what} does not run inside torch.func (grad, vjp, jvp, vmap) and its relatives: take .backward() or "
            "torch.autograd.grad, and give a batch as one call"
        )


def require_tensors(**given: object) -> None:
    """Raise ValueError for what is no plain tensor: a model's output, or a tensor that is spread over ranks."""
    for name, value in given.items():
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor, spread over ranks: give {name}.full_tensor(), or, of a head that is sharded "
                "over the vocabulary, each rank's .to_local() with process_group="
            )
        if not isinstance(value, Tensor):
            hint = " (its .last_hidden_state?)" if hasattr(value, "last_hidden_state") else ""
            hint = " (its .weight?)" if isinstance(value, torch.nn.Linear) else hint
            raise ValueError(f"{name} must be a tensor: got {type(value).__name__}{hint}")


def require_floating(**given: Tensor | None) -> None:
    """Raise ValueError for a tensor of whole numbers, or of a dtype that nothing is computed in."""
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point: got {tensor.dtype}")
        if tensor is not None and tensor.dtype not in FLOATING:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64: got {tensor.dtype}")


def require_number(name: str, value: object, *, whole: bool = False) -> None:
    """Raise ValueError for what is no number, or no ``whole`` one."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number: got {value!r}")


def require_real(**given: Tensor) -> None:
    """Raise ValueError for a tensor that holds flags, complex numbers or float8."""
    for name, tensor in given.items():
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise ValueError(f"{name} must hold real numbers: got {tensor.dtype}")
        if tensor.is_floating_point():
            require_floating(**{name: tensor})


def require_said(name: str, count: int, lengths: Sequence[int]) -> None:
    """Raise ValueError for (``count``,) values of as many packed tokens as sequences: of which, only a shape can say.

    Args:
        lengths: loss tokens of each sequence; where all have one, both readings are the same.
    """
    if count > 1 and any(length != 1 for length in lengths):
        raise ValueError(
            f"{name} may be one per sequence or one per token, {count} of each: give it as {(count, 1)} for one per "
            f"sequence, or as {(1, count)} for one per token"
        )


def same_device(hidden: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError where a tensor lives on another device than the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"all tensors must be on one device: the first is on {hidden.device}, {name} on {tensor.device}"
            )


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Labels are int64 classes or -100. Values are looked at on a CPU, elsewhere only with ``FUSED_PO_CHECK=1``.

    Raises:
        ValueError: wrong dtype, or a label out of range.
    """
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64: got {labels.dtype}")
    if not looks_at(labels):
        return
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be {IGNORE} or lie in [0, {vocab_size}): "
            f"got {labels[wrong][0].item()} at {wrong.nonzero()[0].tolist()}"
        )


def check_scalars(temperature: float | Tensor, softcap: float | None, logit_scale: float) -> None:
    """Numbers of the logit transform.

    Raises:
        ValueError: a temperature or softcap that is not a positive number, a logit scale that is not finite.
    """
    if not isinstance(temperature, Tensor):
        require_number("temperature", temperature)
    if softcap is not None:
        require_number("softcap", softcap)
    require_number("logit_scale", logit_scale)
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number: got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None: got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite: got {logit_scale}")


def check_main_grad(main_grad: Tensor, weight: Tensor, shape: torch.Size, wide: torch.dtype, wanted: bool) -> None:
    """Where dW (of ``shape``) is to be added, in the dtype that products accumulate in.

    Raises:
        ValueError: another shape, dtype or device, or a weight that wants no gradient.
    """
    require_tensors(main_grad=main_grad)
    same_device(weight, main_grad=main_grad)
    if main_grad.shape != shape or main_grad.dtype != wide or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad must be {tuple(shape)}, the shape of weight, {wide} and contiguous: got {_shape(main_grad)} "
            f"{main_grad.dtype}"
        )
    if not wanted:
        raise ValueError("main_grad is where the weight's gradient goes: the weight wants none")


def check_outputs(outputs: Sequence[str]) -> None:
    """Names of statistics.

    Raises:
        ValueError: a string in place of a sequence, none at all, or an unknown name.
    """
    if isinstance(outputs, str) or not outputs:
        raise ValueError(f"outputs must be a sequence of names from {', '.join(STATISTICS)}: got {outputs!r}")
    for name in outputs:
        if name not in STATISTICS:
            hint = meant([name], STATISTICS)
            raise ValueError(f"unknown output {name!r}{hint}: expected some of {', '.join(STATISTICS)}")


def check_cu_seqlens(cu_seqlens: Tensor | None, count: int) -> Tensor:
    """(B + 1,) int64 bounds on the host of packed sequences over ``count`` rows.

    Raises:
        ValueError: not a 1-D integer tensor from 0 to ``count`` that never decreases.
    """
    if cu_seqlens is None:
        return torch.tensor([0, count], device="cpu")
    require_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be a 1-D integer tensor: got {_shape(cu_seqlens)} {cu_seqlens.dtype}")
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    if bounds[0] != 0 or bounds[-1] != count or bool((bounds.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to {count}, the number of rows: got {bounds.tolist()[:8]}")
    return bounds


def row_temperatures(
    temperature: float | Tensor,
    labels: Tensor,
    spread: Tensor | None,
    dtype: torch.dtype,
    lengths: Sequence[int] = (),
) -> Tensor | None:
    """Temperatures per position, flat, in ``dtype``; None where a number serves all, which in a trace is 1 alone.

    Args:
        temperature: a number, a 0-dimensional tensor, (B,), or the shape of labels.
        labels: (B, S) or (N,).
        spread: for packed labels, the sequence that each position belongs to (N,); None without packing.
        lengths: loss tokens of each sequence, where they are known.

    Raises:
        ValueError: any other shape, or (B,) of packed labels where that may be one per token; on a CPU, or with
            ``FUSED_PO_CHECK=1``, a value that is not positive.
    """
    if not isinstance(temperature, Tensor):
        if not torch.compiler.is_compiling() or temperature == 1.0:
            return None
        # as a number it would be compiled for anew with each value
        temperature = torch.full((), temperature, dtype=dtype, device=labels.device)
    found = _spread_temperatures(temperature, labels, spread, dtype, lengths)
    if looks_at(labels):
        read = found[labels.reshape(-1) != IGNORE]
        if not bool(((read > 0) & read.isfinite()).all()):
            raise ValueError("temperature must be positive and finite for every loss token")
    return found


def _spread_temperatures(
    temperature: Tensor, labels: Tensor, spread: Tensor | None, dtype: torch.dtype, lengths: Sequence[int]
) -> Tensor:
    require_tensors(temperature=temperature)
    same_device(labels, temperature=temperature)
    require_real(temperature=temperature)
    values = temperature.detach().to(dtype)
    if values.ndim == 0:
        return values.expand(labels.numel()).contiguous()
    if labels.ndim == 1 and values.shape == (1, labels.shape[0]):
        return values.reshape(-1)
    if labels.ndim == 1 and spread is not None and values.ndim == 2 and values.shape[1] == 1:
        return values.reshape(-1).index_select(0, spread)
    if values.shape == labels.shape:
        if labels.ndim == 1 and len(lengths) == labels.shape[0]:
            require_said("temperature", len(lengths), lengths)
        return values.reshape(-1)
    if labels.ndim == 2 and values.shape == labels.shape[:1]:
        return values.unsqueeze(1).expand(labels.shape).reshape(-1)
    if spread is not None and values.ndim == 1:
        return values.index_select(0, spread)
    if labels.ndim == 1 and spread is None:
        raise ValueError(
            f"temperature of packed labels must be a number or one per token, {_shape(labels)}; one per sequence needs "
            "linear_loss or linear_token_stats with cu_seqlens, or temperature.repeat_interleave(lengths): "
            f"got {_shape(values)}"
        )
    by_sequence = f"{tuple(labels.shape[:1])}" if labels.ndim == 2 else "one per sequence"
    wanted = f"a number, {by_sequence} or the shape of labels {_shape(labels)}"
    raise ValueError(f"temperature must be {wanted}: got {_shape(values)}")


def looks_at(tensor: Tensor) -> bool:
    """Values are looked at where that costs no wait, or where it was asked for."""
    asked = tensor.device.type == "cpu" or os.environ.get("FUSED_PO_CHECK") == "1"
    return asked and has_values(tensor) and not torch.compiler.is_compiling() and tensor.numel() > 0


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
