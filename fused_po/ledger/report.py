"""What a recorded call comes to: sums, prices, its dearest lines, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_po.ledger.operations import Operation
from fused_po.prices import Device

__all__ = ["Ledger", "Line"]


@dataclass(frozen=True)
class Line:
    """What one line of a program asks for with one operator: how often, and for how many seconds."""

    line: str
    name: str
    times: int
    seconds: float


@dataclass
class Ledger:
    """The operations of a call, in their order.

    Attributes:
        operations: those that start something on the device, or make the host wait.
        peak: the most bytes alive at one time that were not there before.
    """

    operations: list[Operation] = field(default_factory=list)
    peak: int = 0

    @property
    def products(self) -> list[Operation]:
        return [one for one in self.operations if one.is_product]

    @property
    def flops(self) -> int:
        """Of the products."""
        return sum(one.flops for one in self.operations)

    @property
    def traffic(self) -> int:
        """Bytes read and written by all but the products."""
        return sum(one.traffic for one in self.operations if not one.is_product)

    @property
    def accumulators(self) -> int:
        """Bytes of accumulators that products read and wrote again."""
        return sum(one.accumulator for one in self.operations)

    @property
    def launches(self) -> int:
        return sum(one.launches for one in self.operations)

    @property
    def waits(self) -> int:
        """Times that the host waits for the device."""
        return sum(one.waits for one in self.operations)

    def scratch(self, returned: Iterable[Tensor]) -> int:
        """The peak less the gradients that the call returns; one that is not made yet leaves its room free."""
        return max(0, self.peak - sum(tensor.untyped_storage().nbytes() for tensor in returned))

    def seconds(self, device: Device, **options: bool) -> float:
        """All of it, one after the other; see ``Operation.seconds`` for the options."""
        return sum(one.seconds(device, **options) for one in self.operations)

    def dearest(self, device: Device, count: int = 8, **options: bool) -> list[Line]:
        """The lines that cost most, the dearest first."""
        prices: dict[tuple[str, str], float] = {}
        times: Counter[tuple[str, str]] = Counter()
        for one in self.operations:
            key = one.line, one.name
            prices[key] = prices.get(key, 0.0) + one.seconds(device, **options)
            times[key] += 1
        found = [Line(line, name, times[line, name], price) for (line, name), price in prices.items()]
        return sorted(found, key=lambda line: -line.seconds)[:count]

    def table(self, device: Device, count: int = 8) -> str:
        """Sums and the dearest lines, on paper."""
        lines = [
            f"on paper, {device.name}: {1e3 * self.seconds(device):.3f} ms, {len(self.products)} products of "
            f"{self.flops:.3e} FLOP, {self.traffic / 1e9:.2f} GB moved, {self.accumulators / 1e9:.2f} GB of "
            f"accumulators, {self.launches} launches, {self.waits} waits, peak {self.peak / 2**30:.2f} GiB"
        ]
        for line in self.dearest(device, count):
            lines.append(f"{1e3 * line.seconds:10.3f} ms {line.times:6d} x  {line.name}  {line.line}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Equal operations together, so that it can be priced again for another device."""
        times = Counter(self.operations)
        rows = []
        for one, count in times.items():
            row = {name: value for name, value in asdict(one).items() if value}
            if one.dtype is not None:
                row["dtype"] = str(one.dtype).removeprefix("torch.")
            rows.append(row | {"launches": one.launches, "times": count})
        return {"peak": self.peak, "operations": rows}

    @staticmethod
    def from_json(found: dict[str, Any]) -> Ledger:
        """What ``to_json`` wrote, but for the order."""
        operations = []
        for row in found["operations"]:
            given = dict(row)
            times = given.pop("times")
            if "dtype" in given:
                given["dtype"] = getattr(torch, given["dtype"])
            operations += [Operation(**given)] * times
        return Ledger(operations, found["peak"])
