"""A call on paper: every operation that it makes a device run, listed, counted and priced without that device.

    from fused_po.ledger import record
    from fused_po.prices import device

    with record() as ledger:            # tensors on "meta": shapes without values
        linear_loss(hidden, weight, labels, loss, plan=plan).loss.backward()
    print(ledger.table(device("h200")))

A dispatch mode sees what reaches the device: ATen operations, derivatives and metrics included, and the kernels of this
package. What it cannot see is how long they take: figures are FLOP over a rate and bytes over a bandwidth.
"""

from fused_po.ledger.recorder import autocast, record
from fused_po.ledger.report import Ledger

__all__ = ["Ledger", "autocast", "record"]
