"""The planner: whole horizons, every row once, and row sets that index as tensors do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_po.ops.planning import Rows, cut, make_plan, static_plan

lengths = st.lists(st.integers(0, 7), min_size=0, max_size=8)


def plan_of(counts: list[int]):
    labels = torch.full((len(counts), 9), -100)
    for row, count in enumerate(counts):
        labels[row, 2 : 2 + count] = 1
    return make_plan(labels), labels


def members(ranges) -> list[int]:
    return [i for first, last in ranges for i in range(first, last)]


@given(lengths, st.sampled_from(["token", "sequence", "pair", "group", "batch"]), st.integers(1, 40))
def test_chunks_partition_the_rows_and_cut_no_horizon(counts, horizon, capacity):
    if horizon == "pair":
        counts = counts * 2
    plan, _ = plan_of(counts)
    chunks = cut(plan, horizon, capacity)
    seen = [row for chunk in chunks for row in members(chunk.rows.ranges)]
    assert sorted(seen) == list(range(sum(counts)))
    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    units = {"token": sum(counts), "sequence": len(counts), "pair": len(counts) // 2}.get(horizon, 1)
    assert len(chunks) <= max(units, 1)
    for chunk in chunks:
        sequences = members(chunk.sequences)
        if horizon == "token":
            assert not sequences and chunk.rows.count <= capacity
            continue
        # the rows are exactly those of the sequences, in order
        assert members(chunk.rows.ranges) == [r for s in sequences for r in range(bounds[s], bounds[s + 1])]
        if horizon == "pair":
            half = len(sequences) // 2
            assert [s + len(counts) // 2 for s in sequences[:half]] == sequences[half:]
        held = {"sequence": len(sequences), "pair": len(sequences) // 2}.get(horizon, 1)
        assert held == 1 or chunk.rows.count <= capacity


def test_pairs_need_an_even_number_of_sequences():
    plan, _ = plan_of([1, 2, 3])
    with pytest.raises(ValueError, match="even number of sequences, chosen then rejected: got 3"):
        cut(plan, "pair", 10)


@given(lengths)
def test_plan_finds_the_loss_tokens(counts):
    plan, labels = plan_of(counts)
    assert plan.lengths == tuple(counts) == tuple(plan.segments.tolist())
    assert plan.positions == labels.numel()
    found = torch.arange(labels.numel()) if plan.rows is None else plan.rows
    assert torch.equal(found, (labels.flatten() != -100).nonzero().flatten())


def test_plan_of_packed_sequences():
    labels = torch.tensor([-100, 1, 2, -100, -100, 3])
    plan = make_plan(labels, cu_seqlens=torch.tensor([0, 3, 3, 6], dtype=torch.int32))
    assert plan.lengths == (2, 0, 1)
    assert plan.rows.tolist() == [1, 2, 5]
    assert make_plan(labels).lengths == (3,)


@pytest.mark.parametrize(
    "bounds", [[0, 3], [1, 6], [0, 4, 3, 6], [0.0, 6.0], [[0, 6]]], ids=["short", "late", "falling", "float", "2-D"]
)
def test_bad_cu_seqlens(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        make_plan(torch.zeros(6, dtype=torch.int64), cu_seqlens=torch.tensor(bounds))


def test_static_plan_reads_no_label():
    plan = static_plan(torch.empty(3, 4, dtype=torch.int64, device="meta"), packed=False)
    assert plan.rows is None and plan.masked and plan.lengths is None and (plan.batch, plan.count) == (3, 12)
    with pytest.raises(ValueError, match="pass plan="):
        static_plan(torch.zeros(6), packed=True)


@pytest.mark.parametrize("horizon", ["token", "sequence", "pair", "batch"])
@pytest.mark.parametrize("capacity", [1, 7, 8, 17, 100])
def test_a_static_plan_is_cut_as_one_whose_lengths_are_known(horizon, capacity):
    labels = torch.zeros(6, 4, dtype=torch.int64)
    known, static = make_plan(labels), static_plan(labels, packed=False)
    found = [(chunk.rows.ranges, chunk.sequences) for chunk in cut(static, horizon, capacity)]
    assert found == [(chunk.rows.ranges, chunk.sequences) for chunk in cut(known, horizon, capacity)]


@given(st.data())
def test_rows_index_as_tensors_do(data):
    total = data.draw(st.integers(1, 12))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=4, max_size=4)))
    ranges = ((cuts[0], cuts[1]), (cuts[2], cuts[3]))
    positions = data.draw(st.none() | st.permutations(range(15)).map(lambda p: torch.tensor(sorted(p[:total]))))
    rows = Rows(ranges, positions)
    index = torch.tensor(members(ranges), dtype=torch.int64)
    flat = torch.randn(15, 2)
    places = index if positions is None else positions[index]
    assert rows.count == len(index)
    planned = torch.randn(total)
    assert torch.equal(rows.take(planned), planned[index])
    assert torch.equal(rows.gather(flat), flat[places])
    first = data.draw(st.integers(0, len(index)))
    last = data.draw(st.integers(first, len(index)))
    assert torch.equal(rows.part(first, last).gather(flat), flat[places[first:last]])
    values, target = torch.randn(len(index), 2), torch.zeros(15, 2)
    rows.scatter(target, values)
    want = torch.zeros(15, 2)
    want[places] = values
    assert torch.equal(target, want)
