"""Compiles launches of the Triton kernels without a GPU: a program that answers each line of JSON with another.

It is a program of its own, since the interpreter (``TRITON_INTERPRET=1``) and the compiler exclude each other in one
process. What a launch is specialised on (alignment, values equal to 1) and how its options are read is left to Triton:
``JITFunction.warmup`` goes the way of a launch up to the point where a GPU would be needed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fused_po.kernels import triton_blocks, triton_rows

KERNELS = {
    name: getattr(module, name)
    for module in (triton_rows, triton_blocks)
    for name in dir(module)
    if name.endswith("_kernel")
}


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # kernels are kept by device
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def _argument(given: Any) -> Any:
    """A number, or a tensor of the dtype and alignment that were asked for."""
    if not isinstance(given, dict):
        return given
    dtype = getattr(torch, given["dtype"])
    memory = torch.empty(64, dtype=dtype)
    first = (given["alignment"] - memory.data_ptr()) % 16 // dtype.itemsize
    tensor = memory[first:]
    assert tensor.data_ptr() % 16 == given["alignment"]
    return tensor


def answer(request: dict[str, Any]) -> dict[str, Any]:
    driver.set_active(NoGpu(request["architecture"]))
    function = KERNELS[request["kernel"]]
    arguments = [_argument(given) for given in request["arguments"]]
    compiled = function.warmup(*arguments, grid=(1,), **request["options"])
    signature = compiled.src.signature
    # what became a constant is no parameter
    kept = [signature[name] != "constexpr" for name, _ in zip(function.arg_names, arguments, strict=False)]
    types = [signature[name] for name, _ in zip(function.arg_names, arguments, strict=False)]
    return {
        "ptx": compiled.asm["ptx"],
        "name": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "kept": kept,
        "types": types,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
