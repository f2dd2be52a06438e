"""What half-precision products of a GPU become in a trace, on fake CUDA tensors: with a CUDA build of torch, no GPU."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fused_po.ops.head import Head

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")

R, H, V = 24, 16, 40


def products(weight, hidden, tile, rows, total):
    """GEMM 1 to 3, each written and added to."""
    head = Head(weight, None, weight.dtype, 1.0, None, 1.0, 1 << 20, None)
    logits = torch.empty(R, V, device=hidden.device)
    head.logits_into(logits, hidden, head.every())
    dh = head.hidden_grad(None, tile, head.every())
    dh = head.hidden_grad(dh, tile, head.every())
    head.weight_grad(total, tile, rows, add=True)
    narrow = torch.empty_like(weight)
    head.weight_grad(narrow, tile, rows, add=False)
    return logits, dh, total, narrow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inductor_lowers_every_product(dtype, monkeypatch):
    # registers the lowerings of products
    import torch._inductor.kernel.mm
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        made = [torch.empty(shape, dtype=dtype, device="cuda") for shape in ((V, H), (R, H), (R, V), (R, H))]
        total = torch.empty(V, H, device="cuda")
        graph = make_fx(torch.func.functionalize(products), decomposition_table=select_decomp_table())(*made, total)
    found = [node for node in graph.graph.nodes if node.op == "call_function" and "mm" in str(node.target)]
    assert len(found) == 5
    for node in found:
        lowering = lowerings.get(node.target)
        assert lowering is not None, node.target
        # the arguments that the lowering takes
        inspect.signature(lowering).bind(*node.args, **node.kwargs)
