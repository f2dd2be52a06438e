"""Use an installed package once: ``python -I smoke.py compiled|sources``, as it should bring the CUDA extension along.

Trains nothing: the loss and its gradients of one small batch beside plain PyTorch's, and what belongs in a wheel.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.resources import files

import torch
import torch.nn.functional as F

import fused_po


def check_loss() -> None:
    """DPO without a reference model's share, from hidden states (4, 5, 8) and a head (11, 8)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (4, 5), generator=generator)
    reference = torch.zeros(4, dtype=torch.float64)
    loss = fused_po.losses.create("sigmoid", beta=0.1)
    fused = fused_po.linear_loss(hidden, weight, labels, loss, ref_logp=reference).loss
    grads = torch.autograd.grad(fused, (hidden, weight))

    logp = F.log_softmax(hidden @ weight.T, -1).gather(-1, labels[..., None]).squeeze(-1)  # (4, 5)
    chosen, rejected = logp.sum(-1).chunk(2)  # (2,) each
    plain = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(grads, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def check_contents(wanted: str) -> None:
    package = files("fused_po")
    for name in ("py.typed", "csrc/bindings.cpp", "kernels/configs.json", "data/preferences.jsonl"):
        assert package.joinpath(name).is_file(), f"{name} is not in the package"
    found = importlib.util.find_spec("fused_po._cuda")
    assert (found is not None) == (wanted == "compiled"), f"the CUDA extension: {found}"
    if found is not None:
        from fused_po import _cuda

        print("  CUDA extension:", _cuda.build_info()["nvcc"], "GPUs:", _cuda.device_count())


if __name__ == "__main__":
    check_contents(sys.argv[1])
    check_loss()
    print(f"  fused_po {fused_po.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}: fine")
