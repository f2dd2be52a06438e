"""What long runs do to a process: memory over a thousand steps, calls from several threads, and in a forked process."""

from __future__ import annotations

import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from fused_po import linear_loss, linear_token_stats, losses, splits

H, V = 32, 257
NAMES = ("sigmoid", "kto", "dapo", "simpo", "gspo")


def step(seed: int, name: str = "sigmoid", **options) -> dict[str, torch.Tensor]:
    """One training step's work: the loss of a batch whose lengths the seed draws, its gradients, and statistics."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = 2 * int(torch.randint(1, 5, (), generator=generator)), 4 + seed % 13
    hidden = torch.randn(batch, length, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    labels = torch.randint(V, (batch, length), generator=generator)
    loss = losses.create(name)
    known = {
        "ref_logp": torch.full((batch,), -20.0),
        "old_logp": torch.full((batch, length), -5.0),
        "advantage": torch.randn(batch, generator=generator),
        "desirable": torch.arange(batch) % 2 == 0,
        "kl": torch.zeros(()),
    }
    side = {key: value for key, value in known.items() if key in loss.needs}
    out = linear_loss(hidden, weight, labels, loss, **side, **options)
    out.loss.backward()
    stats = linear_token_stats(hidden, weight, labels, outputs=("logp", "entropy"))
    return {"loss": out.loss.detach(), "hidden": hidden.grad, "weight": weight.grad, "entropy": stats.entropy.detach()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.nightly
def test_memory_does_not_grow_over_a_thousand_steps():
    """Caches are bounded: batch sizes, lengths, losses and splits vary, and what a step leaves behind is freed."""
    process = psutil.Process()
    schedule = splits.controlled_dpo()
    sizes, tensors = [], []
    for number in range(1000):
        options = {"split": schedule.at(number / 1000)} if number % 5 == 0 else {}
        step(number, NAMES[number % len(NAMES)], scratch_bytes=(1 << 14) << number % 4, **options)
        if number % 100 == 99:
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
            tensors.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
    # the first hundreds fill caches and the allocator's arenas
    assert sizes[-1] - sizes[3] < 8, f"MiB after each hundred steps: {sizes}"
    assert tensors[-1] == tensors[3], tensors


def test_calls_from_several_threads():
    """Each call is its own: what one thread computes does not depend on the others."""
    alone = [step(seed, NAMES[seed % len(NAMES)]) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: step(seed, NAMES[seed % len(NAMES)]), range(20)))
    for first, second in zip(alone, together, strict=True):
        assert_same(first, second)


def test_a_forked_process_computes_the_same():
    """As the workers of a data loader are forked from a process that has trained."""
    wanted = step(3)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # the threads of the parent are not here
            torch.set_num_threads(1)
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump({name: value.numpy() for name, value in step(3).items()}, pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert_same(wanted, {name: torch.from_numpy(value) for name, value in pickle.loads(data).items()})
