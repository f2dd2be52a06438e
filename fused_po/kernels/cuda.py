"""The kernels in CUDA C++: the backend in front of the extension module.

The extension takes raw pointers, so that one build serves every version of torch; whatever could make it read or write
elsewhere is refused here.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fused_po.kernels.build import BuildError
from fused_po.kernels.contract import ANCHORS, PARTIALS, Coefficients, Span, Transform
from fused_po.kernels.jit import load_extension
from fused_po.stats import STATISTICS

__all__ = ["extension", "row_grad", "row_softmax", "row_stats", "unsupported"]

# as the extension numbers them
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIDEST = 1 << 20

logger = logging.getLogger("fused_po")


@cache
def extension() -> tuple[ModuleType | None, str | None]:
    """The extension module, built at the first call where need be, or the reason in words why there is none.

    Whatever goes wrong is a reason, since other kernels do the same: it is logged once and ends nothing.
    """
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA GPU"
    try:
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        module = load_extension(capabilities)
        if module.device_count() < 1:
            # its CUDA runtime is not torch's
            version = module.build_info()["nvcc"]
            raise BuildError(
                f"the extension sees no GPU: the driver may be too old for CUDA {version}, which it was built with"
            )
    except Exception as error:
        reason = str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}"
        logger.warning("fused_po: no CUDA kernels, Triton's take their place: %s", reason)
        return None, reason
    return module, None


def unsupported(kernel: str, x: Tensor) -> str | None:
    """Why the CUDA kernels can't run a case, in words; None if they can.

    The first question about a tensor on a GPU may build the extension.
    """
    if not x.is_cuda:
        return f"it runs on a CUDA GPU, and the tensors are on {x.device.type!r}"
    if x.dtype not in _DTYPES:
        return f"{x.dtype} is left to the reference"
    if x.stride(1) != 1 and x.shape[1] > 1:
        return "columns must be contiguous"
    if x.shape[1] > _WIDEST:
        return f"{x.shape[1]} columns are more than {_WIDEST}"
    return _unsupported_device(x.get_device())


@cache
def _unsupported_device(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"a GPU of compute capability {major}.{minor}: the kernels need 8.0"
    module, reason = extension()
    if module is None:
        return reason
    built = [*module.architectures(), *re.findall(r"\d+\+PTX", module.build_info().get("flags", ""))]
    if not any(_runs(name, 10 * major + minor) for name in built):
        return f"the extension was built for {', '.join(built)}, not for this GPU's sm_{major}{minor}"
    return None


def _runs(built: str, capability: int) -> bool:
    """Whether code for "sm_90" or "90+PTX" runs on a GPU of a compute capability."""
    number = int(built.removeprefix("sm_").removesuffix("+PTX"))
    # machine code runs within its generation, PTX on whatever comes later
    return capability >= number and (built.endswith("+PTX") or capability // 10 == number // 10)


def row_stats(x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...]) -> Tensor:
    """Partial statistics of each row, see ``contract``: one read."""
    partials = x.new_empty((len(PARTIALS), x.shape[0]), dtype=torch.float32)
    given = _Rows(x, labels, transform, span)
    if x.shape[0]:
        with torch.cuda.device(x.device):
            _module().row_stats(*_matrix(x), *given.arguments, _mask(outputs), partials.data_ptr(), *_place(x))
    return partials


def row_softmax(
    x: Tensor, labels: Tensor, transform: Transform, span: Span, outputs: tuple[str, ...], out: Tensor
) -> Tensor:
    """Partial statistics and the unscaled gradient tile, see ``contract``: one read, one write."""
    partials = x.new_empty((len(PARTIALS), x.shape[0]), dtype=torch.float32)
    given = _Rows(x, labels, transform, span)
    target = _target(out, x)
    if x.shape[0]:
        with torch.cuda.device(x.device):
            _module().row_softmax(
                *_matrix(x), *target, *given.arguments, _mask(outputs), partials.data_ptr(), *_place(x)
            )
    return partials


def row_grad(
    x: Tensor,
    labels: Tensor,
    transform: Transform,
    span: Span,
    anchors: Tensor,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    """``out <- dL/dx`` from the coefficients, see ``contract``: one read, one write."""
    count = x.shape[0]
    given = _Rows(x, labels, transform, span)
    target = _target(out, x)
    anchors = _checked("anchors", anchors, torch.float32, (len(ANCHORS), count), x)
    triple = [None if c is None else _checked("coefficients", c, torch.float32, (count,), x) for c in coefficients]
    if count:
        with torch.cuda.device(x.device):
            pointers = (0 if c is None else c.data_ptr() for c in triple)
            _module().row_grad(*_matrix(x), *target, *given.arguments, anchors.data_ptr(), *pointers, *_place(x))


class _Rows:
    """Labels, transform and span as the extension takes them; keeps the memory behind the pointers alive."""

    def __init__(self, x: Tensor, labels: Tensor, transform: Transform, span: Span) -> None:
        if not 0 <= span.width <= x.shape[1]:
            raise ValueError(f"{span.width} classes do not fit {x.shape[1]} columns")
        self.labels = _checked("labels", labels, torch.int64, (x.shape[0],), x)
        self.temperatures = transform.temperatures
        if self.temperatures is not None:
            self.temperatures = _checked("temperatures", self.temperatures, torch.float32, (x.shape[0],), x)
        self.arguments = (
            self.labels.data_ptr(),
            0 if self.temperatures is None else self.temperatures.data_ptr(),
            float(transform.temperature),
            float(transform.softcap or 0.0),
            float(transform.logit_scale),
            *span,
        )


def _checked(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Contiguous, and what its pointer will be taken for.

    Raises:
        ValueError: another dtype, shape or device.
    """
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != x.device:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name}: got {got}, wanted {shape} {dtype} on {x.device}")
    return tensor.contiguous()


def _target(out: Tensor, x: Tensor) -> tuple[int, int, int]:
    """Pointer, dtype and row stride of the output.

    Raises:
        ValueError: it is not of the shape and on the device of x, or of a dtype that the kernels can't write.
    """
    ordered = out.shape[1:] == (1,) or out.stride(-1) == 1
    if out.shape != x.shape or out.device != x.device or out.dtype not in _DTYPES or not ordered:
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        raise ValueError(f"out: got {got}, wanted {tuple(x.shape)} on {x.device}, narrow floats, contiguous columns")
    return out.data_ptr(), _DTYPES[out.dtype], out.stride(0)


def _matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """Pointer, dtype, rows, columns and row stride."""
    return x.data_ptr(), _DTYPES[x.dtype], *x.shape, x.stride(0)


def _mask(outputs: tuple[str, ...]) -> int:
    return sum(1 << index for index, name in enumerate(STATISTICS) if name in outputs)


def _place(x: Tensor) -> tuple[int, int]:
    """Device and current stream."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def _module() -> ModuleType:
    module, reason = extension()
    if module is None:
        raise RuntimeError(f"no CUDA kernels: {reason}")
    return module
