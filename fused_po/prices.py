"""What work costs on a GPU, on paper: one table of devices, for whoever prices a call before it runs.

Nothing here was calibrated by a run of this project: rates are about what large products and large copies reach on
such a device, which is less than its data sheet says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["DEVICES", "Device", "device"]


@dataclass(frozen=True)
class Device:
    """Rates of a GPU.

    Attributes:
        name: what commands call it.
        half: FLOP/s of large products of bfloat16 or float16 that accumulate in float32.
        tf32: of float32 products where TF32 is allowed.
        single: of float32 products where it is not.
        double: of float64 products.
        bandwidth: bytes/s, read plus written.
        launch: seconds that a kernel takes to start.
        memory: bytes that a process finds free on it, about.
    """

    name: str
    half: float
    tf32: float
    single: float
    double: float
    bandwidth: float
    launch: float = 2.5e-6
    memory: int = 0

    def rate(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """FLOP/s of products with operands of a dtype."""
        if dtype == torch.float64:
            return self.double
        if dtype == torch.float32:
            return self.tf32 if tf32 else self.single
        return self.half

    def moved(self, traffic: float) -> float:
        """Seconds to read and write so many bytes, both counted."""
        return traffic / self.bandwidth

    def product(self, flops: float, traffic: float, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """Seconds of a product: of its FLOP or of its bytes, whichever are longer.

        Args:
            flops: 2 for each multiplication and addition.
            traffic: bytes of the operands, and of a result that is written for the first time. Reading and writing an
                accumulator again comes on top: ``moved``.
            dtype: of the operands.
            tf32: float32 products may round their operands.
        """
        return max(flops / self.rate(dtype, tf32=tf32), self.moved(traffic))


# large products of random data reach about three quarters of a data sheet's dense rate, large copies nine tenths
DEVICES = {
    known.name: known
    for known in (
        Device("a100", half=260e12, tf32=130e12, single=17e12, double=17e12, bandwidth=1.8e12, memory=79 << 30),
        Device("h100", half=750e12, tf32=370e12, single=50e12, double=50e12, bandwidth=3.0e12, memory=79 << 30),
        Device("h200", half=750e12, tf32=370e12, single=50e12, double=50e12, bandwidth=4.3e12, memory=139 << 30),
        Device("b200", half=1700e12, tf32=850e12, single=56e12, double=28e12, bandwidth=7.2e12, memory=178 << 30),
    )
}


def device(name: str) -> Device:
    """A device by name.

    Raises:
        ValueError: one that is not in the table.
    """
    if name not in DEVICES:
        raise ValueError(f"no prices of {name!r}: wanted {', '.join(DEVICES)}")
    return DEVICES[name]
