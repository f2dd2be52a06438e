"""How much memory a call will take: from shapes alone, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from fused_po.ops.gradients import Wanted
from fused_po.ops.peaks import peak
from fused_po.ops.routes import Route
from fused_po.ops.sizes import Sizes, default_scratch

__all__ = ["ROUTES", "MemoryPrediction", "largest_length", "predict_memory"]

ROUTES = ("linear_loss", "linear_token_stats", "full_logits")
# blocks of rows that the CPU kernels work on, and numbers of each token: statistics, coefficients, side inputs
KERNEL_BLOCKS, TOKEN_BYTES = {"cpu": 3 << 20}, 200
# no length beyond is asked for
MOST_TOKENS = 1 << 34


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes alive at the peak of a forward and backward, by what they hold.

    Attributes:
        inputs: hidden states, weight and labels, which the caller holds.
        gradients: of hidden states and weight, as they are returned, those made by then.
        accumulator: dW in float32 where that is added to and the weight narrower, and dH in float32 for float16.
        scratch: tiles of logits and of their gradient, products on their way.
        logits: full logits, their softmax and gradients; of the route that has them.
        tokens: numbers per token.
    """

    inputs: int = 0
    gradients: int = 0
    accumulator: int = 0
    scratch: int = 0
    logits: int = 0
    tokens: int = 0

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    @property
    def above_inputs(self) -> int:
        """What ``peak_memory`` counts of the call."""
        return self.peak - self.inputs

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def predict_memory(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    route: str = "linear_loss",
    trainable: bool = True,
    entropy: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scratch_bytes: int | None = None,
) -> MemoryPrediction:
    """The peak of a forward and backward through the head, in bytes.

    From the route that the operations take (``ops.routes``), and for full logits from what autograd keeps: the softmax
    in float32 from forward to backward, and there two gradients as large. Holds within 15 % and 4 MiB of what
    ``peak_memory`` counts on a CPU; libraries' own workspaces are not in it.

    Args:
        tokens: N, all of which carry loss.
        hidden_size: H.
        vocab_size: V.
        route: ``linear_loss``, ``linear_token_stats`` or ``full_logits``: plain torch, softmax in float32.
        trainable: the head is trained; False: frozen, as under LoRA.
        entropy: the gradient also flows through the entropy.
        dtype: of hidden states and weight, float32, bfloat16 or float16.
        device: decides the default budget.
        scratch_bytes: as in ``linear_loss``; default 1 GiB on a GPU, 96 MiB on a CPU.

    Raises:
        ValueError: sizes below 1, or an unknown route.
    """
    if min(tokens, hidden_size, vocab_size) < 1:
        raise ValueError(f"tokens, hidden_size and vocab_size must be positive: got {tokens, hidden_size, vocab_size}")
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}: got {route!r}")
    narrow = dtype.itemsize
    rows, head_elements = tokens * hidden_size, vocab_size * hidden_size
    inputs = (rows + head_elements) * narrow + 8 * tokens
    d_hidden, d_weight = rows * narrow, head_elements * narrow if trainable else 0
    if route == "full_logits":
        return _full_logits(tokens * vocab_size, inputs, d_hidden + d_weight, narrow, entropy)
    kind = torch.device(device).type
    scratch = default_scratch(kind) if scratch_bytes is None else scratch_bytes
    wanted, fused = Wanted(True, trainable, False), route == "linear_loss"
    sizes = Sizes(hidden_size, vocab_size, dtype, dtype, wanted, scratch)
    way = Route.of(sizes, tokens, fused=fused, unscaled=fused and not entropy)
    found = peak(way, tokens, fused=fused, plain=not entropy, widens=kind == "cpu" and narrow < 4)
    blocks = KERNEL_BLOCKS.get(kind, 0)
    numbers = TOKEN_BYTES * tokens
    return MemoryPrediction(inputs, found.gradients, found.accumulator, found.scratch + blocks, 0, numbers)


def largest_length(memory: int, predict: Callable[[int], MemoryPrediction]) -> int:
    """The most tokens whose predicted peak is within ``memory`` bytes; 0 if not even one is.

    Args:
        predict: from tokens to the prediction, which must not fall as they grow.
    """
    low, high = 0, 1
    while high < MOST_TOKENS and predict(high).peak <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if predict(middle).peak <= memory else (low, middle)
    return low


def _full_logits(elements: int, inputs: int, gradients: int, narrow: int, entropy: bool) -> MemoryPrediction:
    """Logits in their dtype, float32 from the softmax on."""
    copy = narrow + 4 if narrow < 4 else 4
    forward = copy + 4
    # the softmax, the gradient that reaches it, and what it makes of that
    backward = 12
    if entropy:
        # the softmax's exponential and the product wait with it
        forward, backward = max(copy + 4, 12), 20
    last = elements * narrow + gradients
    peak = max(elements * forward, elements * backward, last)
    held = gradients if peak == last else 0
    return MemoryPrediction(inputs=inputs, gradients=held, logits=peak - held)
