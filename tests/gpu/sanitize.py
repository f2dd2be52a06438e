"""Every CUDA kernel once on small, awkward cases: ``compute-sanitizer python -m tests.gpu.sanitize``.

With ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``: torch's blocks are larger than what they hold, and would hide an access
behind the end.
"""

from __future__ import annotations

import itertools
import sys

import torch

from fused_po.kernels import cuda, library
from fused_po.kernels.contract import Coefficients, Span, Transform, finish
from fused_po.stats import STATISTICS

# one column, less than a warp, no multiple of 16 bytes, and wide enough for every way of holding a row
WIDTHS = (1, 31, 1001, 32001, 151936)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main() -> None:
    module, reason = cuda.extension()
    assert module is not None, reason
    torch.manual_seed(0)
    for width, dtype, offset in itertools.product(WIDTHS, DTYPES, (0, 1)):
        # misaligned where there is an offset; the memory ends with the last row
        memory = torch.randn(offset + 3 * (width + 3), device="cuda").to(dtype)
        x = memory[offset:].view(3, width + 3)
        labels = torch.tensor([0, width - 1, -100], device="cuda")
        ones = torch.ones(3, device="cuda")
        transform = Transform(1.0, 0.5 + ones, softcap=20.0 if offset else None, logit_scale=1.5)
        span = Span(0, width)
        partials = library.row_stats(x, labels, transform, span, STATISTICS, "cuda")
        _, anchors = finish(partials, labels, width, STATISTICS)
        out = torch.full_like(x, torch.nan)
        library.row_softmax(x, labels, transform, span, STATISTICS, out, "cuda")
        library.row_grad(x, labels, transform, span, anchors, Coefficients(ones, ones, ones), None, "cuda")
        torch.cuda.synchronize()
        assert out.isfinite().all() and x.isfinite().all(), (width, dtype, offset)
        print(width, dtype, offset, flush=True)


if __name__ == "__main__":
    sys.exit(main())
