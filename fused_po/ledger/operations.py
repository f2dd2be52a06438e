"""One operation of a call: what it is, the FLOP and bytes it takes, and where it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_po.prices import Device

__all__ = ["Operation"]


@dataclass(frozen=True)
class Operation:
    """What a device was asked to do.

    Attributes:
        name: of the operator, as in ``aten::mm``.
        line: ``file:line`` that asked for it, within the package where there is such a line.
        flops: of a product; 0: no product.
        dtype: of a product's operands.
        traffic: bytes read plus written; of a product without those of an accumulator.
        accumulator: bytes of a result that was there before and is added to: read and written again.
        launches: kernels and copies that are started.
        waits: times that the host waits for the device.
    """

    name: str
    line: str
    flops: int = 0
    dtype: torch.dtype | None = None
    traffic: int = 0
    accumulator: int = 0
    launches: int = 1
    waits: int = 0

    @property
    def is_product(self) -> bool:
        return self.dtype is not None

    def seconds(self, device: Device, *, hidden: bool = False, launches: bool = False, tf32: bool = False) -> float:
        """Its price.

        Args:
            device: whose rates.
            hidden: an accumulator passes through memory while the product computes; else it comes on top.
            launches: each takes its time, and nothing hides it.
            tf32: float32 products may round their operands.
        """
        started = self.launches * device.launch if launches else 0.0
        if self.dtype is None:
            return started + device.moved(self.traffic + self.accumulator)
        if hidden:
            return started + device.product(self.flops, self.traffic + self.accumulator, self.dtype, tf32=tf32)
        exposed = device.moved(self.accumulator)
        return started + device.product(self.flops, self.traffic, self.dtype, tf32=tf32) + exposed
