"""Compiles every Triton kernel for every architecture, without a GPU, and prints its resources as JSON lines.

Run as a program, since the interpreter (``TRITON_INTERPRET=1``) and the compiler exclude each other in one process.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_po.kernels import triton_blocks, triton_rows
from fused_po.kernels.configs import block_and_warps, block_product_config, row_options
from tests.pairwise import cover

ARCHITECTURES = (80, 90, 100, 120)
# logits in, gradient tile out
ELEMENTS = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16"))
NUMBERS = {"inverse": "fp32", "softcap": "fp32", "logit_scale": "fp32"}
KERNELS = {
    "row_stats": triton_rows.row_stats_kernel,
    "row_softmax": triton_rows.row_softmax_kernel,
    "row_grad": triton_rows.row_grad_kernel,
    "block_mm": triton_blocks.block_mm_kernel,
    "block_mm_t": triton_blocks.block_mm_t_kernel,
}
# 16 bytes at a time, into registers or into shared memory
WIDE = r"ld\.global[^;]*\.v[48]\.|ld\.global[^;]*\.v2\.b64|cp\.async[^;]*, 0x10"
PRODUCTS = ("block_mm", "block_mm_t")


def cases(every: bool) -> list[tuple[str, int, tuple[str, str]]]:
    """Kernels, architectures and elements: all, or all for sm_90 and of the others those in which any two meet."""
    found = list(itertools.product(KERNELS, ARCHITECTURES, ELEMENTS))
    few = {found[number] for number in cover(found)}
    return [case for case in found if every or case[1] == 90 or case in few]


def variants(kernel: str) -> list[dict[str, bool]]:
    """Everything off and everything on: the second holds the most registers."""
    if kernel in PRODUCTS:
        return [{"WIDEN": False}]
    flags = [name for name in KERNELS[kernel].arg_names if name.isupper() and name != "BLOCK"]
    return [dict.fromkeys(flags, value) | ({"HAS_C": True} if "HAS_C" in flags else {}) for value in (False, True)]


def signature(kernel: str, elements: tuple[str, str], flags: dict[str, bool]) -> dict[str, str]:
    types = {}
    for name in KERNELS[kernel].arg_names:
        if name.isupper():
            types[name] = "constexpr"
        elif name == "labels_ptr":
            types[name] = "*i64"
        elif name in ("lists_ptr", "counts_ptr"):
            types[name] = "*i32"
        elif kernel in PRODUCTS and name != "out_ptr":
            # rows and weight may be stored wider than the tile
            types[name] = f"*{elements[name == 'tile_ptr']}" if name.endswith("_ptr") else "i32"
        elif kernel not in PRODUCTS and name in ("x_ptr", "out_ptr"):
            types[name] = f"*{elements[name == 'out_ptr']}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = NUMBERS.get(name, "i32")
    return types


def launch(kernel: str, elements: tuple[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options of a launch as the wrappers make them."""
    if kernel in PRODUCTS:
        config = block_product_config(kernel, torch.float32 if elements[1] == "fp32" else torch.bfloat16)
        sizes = {"GROUP": triton_blocks.GROUP, "WIDTH": triton_blocks.WIDTH, "BLOCK": config.pop("BLOCK")}
        return sizes, config
    block, warps = block_and_warps(kernel, 1 << 17)
    return {"BLOCK": block}, {"num_warps": warps, **row_options(kernel, block, warps)}


def compile_one(kernel: str, architecture: int, elements: tuple[str, str], flags: dict[str, bool]) -> dict[str, object]:
    function = KERNELS[kernel]
    constants, options = launch(kernel, elements)
    # pointers and widths divisible by 16, as the launcher finds them for real vocabularies: this is the vectorised code
    aligned = [
        i for i, name in enumerate(function.arg_names) if name.endswith(("_ptr", "width", "stride", "vocab", "hidden"))
    ]
    source = ASTSource(
        function,
        signature(kernel, elements, flags),
        constexprs={**constants, **flags},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {
        "kernel": kernel,
        "architecture": architecture,
        "elements": elements,
        "flags": sorted(name for name, on in flags.items() if on),
        "wide_accesses": len(re.findall(WIDE, compiled.asm["ptx"])),
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a cubin; a stack that is not 0 holds spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    assert found, report.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for kernel, architecture, elements in cases("--all" in sys.argv):
        for flags in variants(kernel):
            print(json.dumps(compile_one(kernel, architecture, elements, flags)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
