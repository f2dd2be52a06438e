"""What a loss sees of the data: packed tokens, their sequences and pairs, side inputs and normalisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_po.losses.segments import spread, sum_segments

__all__ = ["OPTIONAL", "PER_SEQUENCE", "SCALAR", "SIDE_INPUTS", "SPREAD", "SUMMED", "TOKEN_FLAGS", "Batch"]

# given per token, or per sequence as the sum over its loss tokens
SUMMED = frozenset({"ref_logp", "old_logp", "sampling_logp"})
# given per token, or per sequence as the value of each of its tokens
SPREAD = frozenset({"advantage", "importance_weight", "row_weight"})
PER_SEQUENCE = frozenset({"desirable"})
TOKEN_FLAGS = frozenset({"nll_mask"})
SCALAR = frozenset({"kl", "shift"})
SIDE_INPUTS = SUMMED | SPREAD | PER_SEQUENCE | TOKEN_FLAGS | SCALAR
# a loss that reads one of these has a meaning without it
OPTIONAL = frozenset({"old_logp", "sampling_logp", "importance_weight", "row_weight", "nll_mask", "shift"})


@dataclass(frozen=True)
class Batch:
    """The N loss tokens of a call, or of a chunk of it, packed sequence after sequence, and what a loss reads of them
    beside the statistics.

    A loss reads side inputs by ``token``, ``sequence`` or ``scalar``, which heed the shape that they were given in, and
    sums by the reductions below, which heed ``mask`` and divide by the counts of the whole call.

    Attributes:
        segments: (B,) int64, rows of each sequence; they sum to N.
        lengths: (B,) int64, loss tokens of each sequence. Equal to ``segments`` unless ``mask`` is given.
        mask: (N,) bool, True where a row carries loss; None where all do. Use the reductions below, which heed it.
        num_tokens, num_sequences: normalisers of the whole call (or of all ranks, where the caller gave
            them), never of this chunk.
        num_chosen_tokens: normaliser of the tokens of chosen answers; where it was not given but ``num_sequences``
            was, those of the call times what that is of the call's sequences.
        num_call_tokens: loss tokens of the call, whatever ``num_items`` says, times the same.
        chosen: (N,) bool, True for tokens of the first half of the call's sequences (the chosen answers of pairs).
        token_lengths: (N,) loss tokens of the sequence that a token belongs to, in the whole call.
        per_token: side inputs (N,).
        per_sequence: side inputs (B,).
        scalars: side inputs ().
        own_tokens: loss tokens of the call itself, at least 1: what its metrics are means over.
        some_empty: there may be sequences without a loss token.
        offsets: (B + 1,) int64, the first row of each sequence and N; None where it is not known.
        sequence_of: (N,) int64, the sequence of each row; None likewise. Both spare the reductions below work.
    """

    segments: Tensor  # (B,)
    lengths: Tensor  # (B,)
    chosen: Tensor  # (N,)
    token_lengths: Tensor  # (N,)
    num_tokens: Tensor  # ()
    num_sequences: Tensor  # ()
    num_call_tokens: Tensor  # ()
    num_chosen_tokens: Tensor  # ()
    own_tokens: Tensor  # ()
    mask: Tensor | None = None  # (N,)
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    offsets: Tensor | None = None  # (B + 1,)
    sequence_of: Tensor | None = None  # (N,)
    some_empty: bool = True

    @property
    def num_pairs(self) -> Tensor:
        """Half of ``num_sequences``, ()."""
        return self.num_sequences / 2

    def token(self, name: str) -> Tensor | None:
        """Side input ``name`` per token (N,); None where it was not given.

        Raises:
            ValueError: given as one sum per sequence, which can't be spread over tokens.
        """
        if name in self.per_token:
            return self.per_token[name]
        if name not in self.per_sequence:
            return None
        if name in SUMMED:
            raise ValueError(f"this loss reads {name} token by token: got (B,), wanted the shape of labels")
        return self.spread(self.per_sequence[name])

    def sequence(self, name: str) -> Tensor | None:
        """Side input ``name`` per sequence (B,), per-token log-probs summed; None where it was not given.

        Raises:
            ValueError: given per token, where the loss wants one value per sequence.
        """
        if name in self.per_sequence:
            return self.per_sequence[name]
        if name not in self.per_token:
            return None
        if name not in SUMMED:
            raise ValueError(f"this loss reads {name} per sequence: got one per token, wanted (B,)")
        return self.sum_per_sequence(self.per_token[name])

    def scalar(self, name: str) -> Tensor | None:
        """Side input ``name``, a 0-dimensional tensor; None where it was not given."""
        return self.scalars.get(name)

    def spread(self, values: Tensor) -> Tensor:
        """(B,) -> (N,): each token gets the value of its sequence."""
        return spread(values, self.segments, self.chosen.shape[0], self.sequence_of, self.offsets)

    def sum_tokens(self, values: Tensor) -> Tensor:
        """Sum over the tokens that carry loss: (N,) -> (), in float64."""
        # widened on the way, which takes no pass of its own
        return values.sum(dtype=torch.float64) if self.mask is None else self._masked(values).sum()

    def mean_tokens(self, values: Tensor) -> Tensor:
        """This batch's share of the mean over the call's loss tokens: (N,) -> (), float64."""
        return self.sum_tokens(values) / self.num_tokens

    def mean_call_tokens(self, values: Tensor) -> Tensor:
        """This batch's share of the mean over the call's own loss tokens, ``num_items`` or not: (N,) -> (), float64."""
        return self.sum_tokens(values) / self.num_call_tokens

    def mean_token_means(self, values: Tensor) -> Tensor:
        """This batch's share of the mean over sequences of their token means: (N,) -> (), float64."""
        return self.sum_tokens(values / self.token_lengths.clamp_min(1)) / self.num_sequences

    def mean_token_sums(self, values: Tensor) -> Tensor:
        """This batch's share of the mean over sequences of their token sums: (N,) -> (), float64."""
        return self.sum_tokens(values) / self.num_sequences

    def loss_tokens(self) -> Tensor:
        """(N,) bool, True where a row carries loss."""
        return torch.ones_like(self.chosen) if self.mask is None else self.mask

    def positions(self) -> Tensor:
        """(N,) int64: which loss token of its sequence a token is, from 1."""
        running = self.loss_tokens().cumsum(0)
        return running - self.spread(self.lengths.cumsum(0) - self.lengths)

    def sum_per_sequence(self, values: Tensor) -> Tensor:
        """Sum over the loss tokens of each sequence: (N,) or (N, K) -> (B,) or (B, K), in float64.

        float32 sums move a preference margin by 1e-3 at 2,048 tokens.
        """
        return sum_segments(self._masked(values), self.segments, self.offsets)

    def mean_per_sequence(self, values: Tensor) -> Tensor:
        """Mean over the loss tokens of each sequence, 0 for an empty one: (N,) -> (B,), float64."""
        return self.sum_per_sequence(values) / self.lengths.clamp_min(1)

    def mean_sequences(self, values: Tensor) -> Tensor:
        """This batch's share of the mean over the call's sequences: (B,) -> (). Empty sequences count, but add
        nothing.
        """
        return (torch.where(self.lengths > 0, values, 0.0) if self.some_empty else values).sum() / self.num_sequences

    def mean_pairs(self, values: Tensor) -> Tensor:
        """This batch's share of the mean over the call's pairs: (B/2,) -> (). A pair without any loss token adds
        nothing.
        """
        if self.some_empty:
            chosen, rejected = self.halves(self.lengths)
            values = torch.where(chosen + rejected > 0, values, 0.0)
        return values.sum() / self.num_pairs

    def halves(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen and the rejected half of per-sequence values: (B,) -> (B/2,), (B/2,).

        Raises:
            ValueError: an odd number of sequences.
        """
        # a trace takes no remainder of a size
        half = values.shape[0] // 2
        odd = 2 * half != values.shape[0]
        if odd:
            raise ValueError(f"pairs need an even number of sequences, chosen then rejected: got {values.shape[0]}")
        # one operation to differentiate, where two slices are five
        chosen, rejected = values.unflatten(0, (2, half)).unbind()
        return chosen, rejected

    def _masked(self, values: Tensor) -> Tensor:
        values = values.double()
        if self.mask is None:
            return values
        return torch.where(self.mask if values.ndim == 1 else self.mask.unsqueeze(1), values, 0.0)
