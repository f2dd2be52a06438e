"""Terms that losses share, against torch's own."""

from __future__ import annotations

import pytest
import torch

from fused_po.losses.terms import quantile


@pytest.mark.parametrize("q", [0.0, 0.05, 0.37, 0.5, 0.93, 1.0])
def test_quantiles_are_those_of_torch(q):
    """Between two members too, of members alone."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(23, generator=generator, dtype=torch.float64)
    members = torch.rand(23, generator=generator) < 0.7
    torch.testing.assert_close(quantile(values, members, q), values[members].quantile(q), rtol=1e-13, atol=1e-13)


def test_the_quantile_of_nothing_is_above_everything():
    assert quantile(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.5) == torch.inf
    assert quantile(torch.zeros(3), torch.zeros(3, dtype=torch.bool), 0.5) == torch.inf
