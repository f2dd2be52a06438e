"""A head whose vocabulary is sharded over ranks, as Megatron and tensor-parallel trainers shard it.

Every rank holds the same hidden states and labels and its own rows of the weight. Partial statistics merge (see
``kernels.contract``), so a shard is a tile of the vocabulary that another rank looks at: one gather of seven numbers a
row, then each rank goes on with its own classes. dW and db are those of the shard; dH is the sum over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from fused_po.kernels.contract import Span, merge

__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """This rank's classes.

    Attributes:
        group: the ranks that share the vocabulary, in its order.
        span: the classes of this rank's rows.
        classes: of all ranks.
    """

    group: dist.ProcessGroup
    span: Span
    classes: int

    @staticmethod
    def of(group: dist.ProcessGroup, rows: int, vocab_size: int | None) -> Shard:
        """The shard of a rank whose weight has so many rows.

        Args:
            group: a process group that this rank is in.
            rows: of this rank's weight, the same on every rank.
            vocab_size: classes of all ranks, where rows behind them are padding; None: all rows are classes.

        Raises:
            ValueError: no process group, one without this rank, or a rank without a class.
        """
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"process_group must be a torch.distributed.ProcessGroup or None: got {group!r}")
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        if rank < 0:
            raise ValueError("this rank is not in process_group")
        classes = rows * size if vocab_size is None else vocab_size
        # every rank must see this, or the others would wait for it
        if not rows * (size - 1) < classes <= rows * size:
            raise ValueError(
                f"vocab_size must lie in [{rows * (size - 1) + 1}, {rows * size}], so that each of {size} ranks with "
                f"{rows} rows has a class: got {classes}"
            )
        start = rank * rows
        return Shard(group, Span(start, min(start + rows, classes)), classes)

    def merged(self, partials: Tensor) -> Tensor:
        """Partial statistics (7, R) of the whole vocabulary from those of the shards, the same bits on every rank."""
        partials = partials.contiguous()
        gathered = partials.new_empty((dist.get_world_size(self.group), *partials.shape))
        dist.all_gather_into_tensor(gathered.flatten(0, 1), partials, group=self.group)
        return merge(gathered)

    def summed(self, product: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        # rows of a buffer may be further apart than they are wide, and backends take memory as it lies
        whole = product.contiguous()
        dist.all_reduce(whole, group=self.group)
        return product if whole is product else product.copy_(whole)

    def check(self, rows: int, device: torch.device) -> None:
        """Raise ValueError where ranks hold weights of different heights; reads a number from the device."""
        mine = torch.tensor([rows], device=device)
        found = mine.new_empty(dist.get_world_size(self.group))
        dist.all_gather_into_tensor(found, mine, group=self.group)
        if int(found.min()) != int(found.max()):
            raise ValueError(
                f"every rank's weight must have the same number of rows, the last padded: got {found.tolist()}"
            )
