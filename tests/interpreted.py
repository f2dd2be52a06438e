"""Whether Triton's interpreter can run the kernels here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton

__all__ = ["skip_unless_interpreted"]


def skip_unless_interpreted() -> None:
    """Skip the test, with the reason, where the kernels are compiled or the interpreter fails."""
    if torch.cuda.is_available():
        pytest.skip("the Triton kernels are compiled here, not interpreted")
    # it makes scalars of arrays that have an axis
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0" and triton.__version__.startswith("3.6."):
        pytest.skip(f"Triton {triton.__version__}'s interpreter does not run under NumPy 2.4 and later")
