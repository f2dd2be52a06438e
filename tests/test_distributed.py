"""A vocabulary sharded over ranks: three processes against the whole head in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fused_po import splits
from fused_po.distributed import Shard
from fused_po.kernels.contract import Span
from fused_po.ops import linear_loss, linear_token_stats
from fused_po.ops.workspace import Workspace
from fused_po.stats import STATISTICS
from tests.forked import on_ranks
from tests.losses.cases import create
from tests.ops.problems import Problem, V, relative_error
from tests.ops.test_routes import HEAD_FROZEN, PLENTY, ROW, TOLERANCE

RANKS, ROWS = 3, 13
assert RANKS * ROWS > V


def shard(tensor: Tensor, rank: int) -> Tensor:
    """This rank's rows of a weight or bias, behind which the last rank has padding of any value."""
    padding = torch.full((RANKS * ROWS - V, *tensor.shape[1:]), 1e3, dtype=tensor.dtype)
    rows = torch.cat([tensor.detach(), padding])[rank * ROWS : (rank + 1) * ROWS]
    return rows.clone().requires_grad_(tensor.requires_grad)


def compare(rank: int, problem: Problem, run, want: list[Tensor]) -> None:
    """The gradients of what ``run`` makes of this rank's head, against those of the whole head."""
    mine = {name: shard(problem.tensors[name], rank) for name in ("weight", "bias")}
    hidden = problem.tensors["hidden"].detach().clone().requires_grad_(problem.tensors["hidden"].requires_grad)
    value = run(hidden, mine["weight"], mine["bias"])
    leaves = {"hidden": hidden, **mine}
    names = [name for name, tensor in problem.tensors.items() if tensor.requires_grad]
    got = torch.autograd.grad(value, [leaves[name] for name in names])
    for name, found, truth in zip(names, got, want, strict=True):
        if name == "hidden":
            assert relative_error(found, truth) <= TOLERANCE, name
            continue
        whole = truth[rank * ROWS : (rank + 1) * ROWS]
        real = whole.shape[0]
        assert (found[:real] - whole).norm() <= TOLERANCE * truth.norm(), name
        assert (found[real:] == 0).all()


def losses_on_rank(rank: int) -> None:
    for case in ("sigmoid", "dapo-all", "kto", "gspo"):
        for frozen in (frozenset(), HEAD_FROZEN, frozenset({"hidden"})):
            for scratch in (0, 12 * ROW, PLENTY):
                problem = Problem(create(case), frozen)
                truth = problem.plain()
                want = torch.autograd.grad(truth, problem.leaves)

                def run(hidden, weight, bias, problem=problem, scratch=scratch, truth=truth):
                    out = linear_loss(
                        hidden,
                        weight,
                        problem.labels,
                        problem.loss,
                        bias=bias,
                        scratch_bytes=scratch,
                        process_group=dist.group.WORLD,
                        vocab_size=V,
                        **problem.transform,
                        **problem.side_inputs,
                    )
                    torch.testing.assert_close(out.loss, truth, rtol=1e-11, atol=1e-12)
                    return out.loss

                compare(rank, problem, run, want)


def statistics_on_rank(rank: int) -> None:
    for scratch in (0, 12 * ROW, PLENTY):
        for frozen in (frozenset(), HEAD_FROZEN):
            for fields in (("logp",), ("logp", "entropy", "lse")):
                problem = Problem(create("sigmoid"), frozen)
                stats, kept = problem.stats(), problem.labels >= 0
                weights = torch.randn(3, *problem.labels.shape, generator=torch.Generator().manual_seed(1)).double()
                truth = sum((w * getattr(stats, f))[kept].sum() for w, f in zip(weights, fields, strict=False))
                want = torch.autograd.grad(truth, problem.leaves)

                def run(hidden, weight, bias, problem=problem, scratch=scratch, fields=fields, weights=weights):
                    found = linear_token_stats(
                        hidden,
                        weight,
                        problem.labels,
                        bias=bias,
                        outputs=STATISTICS,
                        scratch_bytes=scratch,
                        process_group=dist.group.WORLD,
                        vocab_size=V,
                        **problem.transform,
                    )
                    kept, plain = problem.labels >= 0, problem.stats()
                    for name, value in found.present().items():
                        torch.testing.assert_close(value[kept], getattr(plain, name)[kept], rtol=1e-10, atol=1e-10)
                    return sum((w * getattr(found, f)).sum() for w, f in zip(weights, fields, strict=False))

                compare(rank, problem, run, want)


def options_on_rank(rank: int) -> None:
    """Rows without a gradient, splits, parts and dropped blocks take the same steps on every rank."""
    problem = Problem(create("sigmoid"))

    def call(weight, bias, group, **options):
        hidden = problem.tensors["hidden"].detach().clone().requires_grad_()
        out = linear_loss(
            hidden,
            weight,
            problem.labels,
            problem.loss,
            bias=bias,
            process_group=group,
            vocab_size=V,
            **problem.transform,
            **problem.side_inputs,
            **options,
        )
        return out, torch.autograd.grad(out.loss, [hidden, weight])

    for options in ({"split": splits.positive_only()}, {"split_gradients": True}, {"max_dropped_mass": 0.05}):
        whole, (dh, dw) = call(problem.tensors["weight"], problem.tensors["bias"], None, **options)
        mine = [shard(problem.tensors[name], rank) for name in ("weight", "bias")]
        out, (got_dh, got_dw) = call(*mine, dist.group.WORLD, **options)
        torch.testing.assert_close(out.loss, whole.loss, rtol=1e-11, atol=1e-12)
        rows = dw[rank * ROWS : (rank + 1) * ROWS]
        # each rank drops of its own mass, and may drop other blocks than the whole head
        bound = TOLERANCE if "max_dropped_mass" not in options else 0.2
        assert relative_error(got_dh, dh) <= bound
        assert (got_dw[: rows.shape[0]] - rows).norm() <= bound * dw.norm()
        if whole.split_gradients is not None:
            for side, truth in whole.split_gradients.hidden.items():
                assert relative_error(out.split_gradients.hidden[side], truth) <= TOLERANCE


def heights_on_rank(rank: int) -> None:
    weight = torch.randn(5 + (rank == 1), 4)
    with pytest.raises(ValueError, match=r"same number of rows, the last padded: got \[5, 6, 5\]"):
        linear_token_stats(torch.randn(2, 4), weight, torch.zeros(2, dtype=torch.int64), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"vocab_size must lie in \[11, 15\].* got 10"):
        Shard.of(dist.group.WORLD, 5, 10)
    labels = torch.tensor([0, 15])
    with pytest.raises(ValueError, match=r"labels must be -100 or lie in \[0, 15\)"):
        linear_token_stats(torch.randn(2, 4), weight[:5], labels, process_group=dist.group.WORLD)


@pytest.mark.parametrize("function", [losses_on_rank, statistics_on_rank, options_on_rank, heights_on_rank])
def test_three_ranks(function, tmp_path):
    on_ranks(function, RANKS, tmp_path)


def test_what_is_no_group_is_refused():
    with pytest.raises(ValueError, match="process_group must be a torch.distributed.ProcessGroup or None: got 'world'"):
        linear_token_stats(
            torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.int64), process_group="world"
        )


def sums_on_rank(rank: int) -> None:
    # rows of 13 float64 numbers lie 16 apart
    product = Workspace(torch.zeros(1)).get("product", 5, 13, torch.float64)
    assert not product.is_contiguous()
    product.copy_(torch.arange(65).view(5, 13) * (rank + 1))
    found = Shard(dist.group.WORLD, Span(0, 13), 39).summed(product)
    assert found is product
    assert torch.equal(found, 6.0 * torch.arange(65, dtype=torch.float64).view(5, 13))


def test_sums_over_ranks_of_rows_that_lie_apart(tmp_path):
    on_ranks(sums_on_rank, RANKS, tmp_path)
