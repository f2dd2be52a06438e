"""What a recorded call comes to: sums, prices, its dearest lines, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fused_po.ledger.operations import Operation
from fused_po.prices import Device

__all__ = ["Ledger"]


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
    def launches(self) -> int:
        return sum(one.launches for one in self.operations)

    @property
    def waits(self) -> int:
        return sum(one.waits for one in self.operations)

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.operations)

    def scratch(self, returned: Iterable[Tensor]) -> int:
        """The peak less the gradients that the call returns; one that is not made yet leaves its room free."""
        return max(0, self.peak - sum(tensor.untyped_storage().nbytes() for tensor in returned))

    def seconds(self, device: Device, **options: bool) -> float:
        """All of it, one after the other; see ``Operation.seconds`` for the options."""
        return sum(one.seconds(device, **options) for one in self.operations)

    def dearest(self, device: Device, count: int = 8, **options: bool) -> list[dict[str, Any]]:
        """The lines that cost most: ``line``, ``name``, ``seconds``, ``times``."""
        prices: Counter[tuple[str, str]] = Counter()
        times: Counter[tuple[str, str]] = Counter()
        for one in self.operations:
            prices[one.line, one.name] += one.seconds(device, **options)  # type: ignore[assignment]
            times[one.line, one.name] += 1
        return [
            {"line": line, "name": name, "seconds": price, "times": times[line, name]}
            for (line, name), price in prices.most_common(count)
        ]

    def by_file(self) -> dict[str, int]:
        """Launches by the file that asks for them, the most first."""
        found: Counter[str] = Counter()
        for one in self.operations:
            found[one.line.rpartition(":")[0]] += one.launches
        return dict(found.most_common())
