"""The ledger: what it counts of small programs whose every byte is known, and of this package's routes."""

from __future__ import annotations

import json

import pytest
import torch

from bench.record_paper import routes
from fused_po import linear_loss, linear_token_stats, losses, make_plan, stats_loss, token_stats
from fused_po.bench import paper_peers, paper_table
from fused_po.bench.methods import Absent
from fused_po.bench.paper import CASES, PaperCase, choose, measured, sheet
from fused_po.cli import main
from fused_po.ledger import Ledger, autocast, record
from fused_po.ledger.operations import Operation
from fused_po.ledger.triton_launches import moved_parameters
from fused_po.losses.policy import PolicyLoss
from fused_po.prices import DEVICES, Device, device
from fused_po.stats import Stats

# everything costs one second a FLOP or byte
UNIT = Device("unit", half=1.0, tf32=8.0, single=2.0, double=4.0, bandwidth=1.0, memory=1, launch=100.0)


def meta(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def only(ledger: Ledger) -> Operation:
    (found,) = ledger.operations
    return found


def test_a_product_is_its_flop_or_its_bytes():
    a, b = meta(3, 5, dtype=torch.bfloat16), meta(5, 7, dtype=torch.bfloat16)
    with record() as ledger:
        a @ b
    found = only(ledger)
    assert (found.name, found.flops, found.dtype) == ("aten::mm", 2 * 3 * 5 * 7, torch.bfloat16)
    assert found.traffic == 2 * (15 + 35 + 21) and found.accumulator == 0
    assert found.seconds(UNIT) == 210 and found.seconds(UNIT, launches=True) == 310
    slow = Device("slow", half=1e9, tf32=1e9, single=1e9, double=1e9, bandwidth=2.0, memory=1)
    assert found.seconds(slow) == 71


@pytest.mark.parametrize("dtype, seconds", [(torch.float32, 105.0), (torch.float64, 52.5)])
def test_products_have_the_rate_of_their_dtype(dtype, seconds):
    one = Operation("aten::mm", "?", flops=210, dtype=dtype)
    assert one.seconds(UNIT) == seconds
    assert one.seconds(UNIT, tf32=True) == (26.25 if dtype == torch.float32 else seconds)


def test_an_accumulator_comes_on_top_unless_it_is_hidden():
    out, a, b = meta(3, 7), meta(3, 5), meta(5, 7)
    with record() as ledger:
        out.addmm_(a, b)
    found = only(ledger)
    assert found.traffic == 4 * (15 + 35) and found.accumulator == 2 * 4 * 21
    # 210 FLOP at two a second, or 200 bytes
    assert found.seconds(UNIT) == 200 + 168 and found.seconds(UNIT, hidden=True) == 368
    fast = Device("fast", half=1.0, tf32=1.0, single=0.25, double=1.0, bandwidth=1.0, memory=1)
    assert found.seconds(fast) == 840 + 168 and found.seconds(fast, hidden=True) == 840
    with record() as ledger:
        torch.ops.aten.addmm.dtype_out(out, a.bfloat16(), b.bfloat16(), torch.float32, out=out)
    assert ledger.operations[-1].accumulator == 168 and ledger.operations[-1].dtype == torch.bfloat16


def test_a_bias_and_a_beta_of_0_are_no_accumulator():
    out, a, b = meta(3, 7), meta(3, 5), meta(5, 7)
    with record() as ledger:
        torch.addmm(meta(7), a, b)
        out.addmm_(a, b, beta=0)
    assert [one.accumulator for one in ledger.products] == [0, 0]
    assert [one.traffic for one in ledger.products] == [4 * (15 + 35 + 21 + 7), 4 * (15 + 35 + 21)]


def test_views_and_memory_that_nobody_fills_cost_nothing():
    x = meta(4, 6)
    with record() as ledger:
        x.view(6, 4).t()[1:].unsqueeze(0).expand(5, 3, 6).detach()
        torch.empty_like(x), x.new_empty(3), x.reshape(24), x.float(), x.contiguous()
    assert ledger.operations == []


def test_bytes_are_those_that_are_touched():
    x, index = meta(100, 6), torch.empty(3, dtype=torch.int64, device="meta")
    cases = {
        # the destination of a copy is written, and not read
        "copy": (lambda: x.copy_(meta(100, 6, dtype=torch.float16)), 2400 + 1200),
        "cast": (lambda: x.bfloat16(), 2400 + 1200),
        "fill": (lambda: x.zero_(), 2400),
        "like": (lambda: x.new_zeros(3), 12),
        "in place": (lambda: x.mul_(2.0), 4800),
        # an expanded operand is read once
        "expanded": (lambda: x * meta(6), 2400 + 24 + 2400),
        "sum": (lambda: x.sum(0), 2400 + 24),
        # three rows of a hundred
        "gathered": (lambda: x.index_select(0, index), 72 + 24 + 72),
        "scattered": (lambda: x.index_copy_(0, index, meta(3, 6)), 72 + 24 + 72),
        "added": (lambda: x.index_add_(0, index, meta(3, 6)), 2 * 72 + 24 + 72),
        "cat": (lambda: torch.cat([x, x]), 2400 + 4800),
    }
    for name, (program, traffic) in cases.items():
        with record() as ledger:
            program()
        assert (name, ledger.traffic, ledger.launches) == (name, traffic, 1)


def test_the_host_and_nothing_at_all_launch_nothing():
    with record() as ledger:
        torch.ones(3) @ torch.ones(3, 3)
        meta(0, 5).mul_(2.0)
    assert ledger.launches == 0


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", torch.float64),
        lambda x: torch.empty(4, 6).copy_(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((meta(4, dtype=torch.bool),), meta(4, 6)),
        lambda x: torch.equal(x, x),
    ],
)
def test_waits_of_the_host_are_counted(wait):
    x = meta(4, 6)
    with record() as ledger:
        wait(x)
    assert ledger.waits == 1
    with record() as ledger:
        # the other way nobody waits
        torch.ones(4, 6).to("meta", non_blocking=True)
    assert ledger.waits == 0 and ledger.launches == 1


def test_the_peak_is_of_what_is_alive_together():
    x = meta(250)
    with record() as ledger:
        y = x + 1.0
        view = y[:10]
        del y
        # the view holds the memory
        z = x + 2.0
        del view
        w = x + 3.0
        x.add_(w)
        del z, w
        x + 4.0
    assert ledger.peak == 2000


def test_a_returned_gradient_leaves_its_room_free():
    x = meta(250).requires_grad_()
    with record() as ledger:
        # what the exponential saves, and the gradient
        x.exp().sum().backward()
    assert ledger.peak == 2000 + 4 + 4
    assert ledger.scratch([x.grad]) == ledger.peak - 1000
    assert ledger.scratch([x.grad] * 5) == 0


def test_lines_are_those_that_ask():
    x = meta(250)
    with record() as ledger:
        x + 1.0
        for _ in range(3):
            x.mul_(2.0)
    first, second = ledger.dearest(UNIT)
    assert (first.times, first.name, first.seconds) == (3, "aten::mul_", 6000.0)
    assert first.line.startswith("tests/test_ledger.py:") and second.times == 1
    assert ledger.launches == 4
    assert "aten::mul_" in ledger.table(UNIT)


def test_json_keeps_what_it_is_priced_by():
    found = sheet(CASES["stats-small"]).ledger
    again = Ledger.from_json(json.loads(json.dumps(found.to_json())))
    assert sorted(map(str, again.operations)) == sorted(map(str, found.operations)) and again.peak == found.peak


def test_pointers_that_a_kernel_loads_and_stores():
    source = """
    def kernel(x_ptr, index_ptr, out_ptr, both_ptr, handed_ptr, n, BLOCK: tl.constexpr):
        rows = x_ptr + tl.program_id(0)
        at = tl.load(index_ptr)
        value = tl.load(rows + at) + other(handed_ptr)
        for _ in range(n):
            tl.store(out_ptr + at, value)
            if n:
                places = both_ptr + 1
                tl.store(places, tl.load(places))
    """
    assert moved_parameters(source) == {"x_ptr": 1, "index_ptr": 1, "out_ptr": 1, "both_ptr": 2}


def test_autocast_of_a_gpu_that_is_not_there():
    hidden, weight, labels = meta(2, 8, 16), meta(32, 16), torch.empty(2, 8, dtype=torch.int64, device="meta")
    with autocast(), record() as ledger:
        linear_token_stats(hidden, weight, labels)
    assert {one.dtype for one in ledger.products} == {torch.bfloat16}
    with record() as ledger:
        linear_token_stats(hidden, weight, labels)
    assert {one.dtype for one in ledger.products} == {torch.float32}


SHAPE = {"tokens": 64, "hidden": 16, "vocab": 96, "sequences": 4}


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("frozen", [False, True])
def test_every_loss_runs_without_values_and_does_not_wait(name, frozen):
    hidden, weight = meta(4, 8, 16, dtype=torch.bfloat16).requires_grad_(), meta(96, 16, dtype=torch.bfloat16)
    weight.requires_grad_(not frozen)
    labels = torch.empty(4, 8, dtype=torch.int64, device="meta")
    loss = losses.create(name)
    # policy losses read log-probs token by token
    logp = meta(4, 8) if isinstance(loss, PolicyLoss) else meta(4)
    every = {"ref_logp": logp, "old_logp": logp, "advantage": meta(4), "kl": meta()}
    every["desirable"] = meta(4, dtype=torch.bool)
    given = {name: value for name, value in every.items() if name in loss.needs}
    plan = make_plan(labels)
    with record() as ledger:
        linear_loss(hidden, weight, labels, loss, plan=plan, **given).loss.backward()
    assert ledger.waits == 0
    assert hidden.grad is not None and (weight.grad is None) == frozen
    stats = {name: meta(4, 8) for name in loss.statistics}
    with record() as ledger:
        stats_loss(Stats(**stats), labels, loss, plan=plan, **given)
    assert ledger.waits == 0 and not ledger.products


def test_statistics_of_logits_show_their_kernels():
    logits = meta(2, 8, 96, dtype=torch.bfloat16).requires_grad_()
    labels = torch.empty(2, 8, dtype=torch.int64, device="meta")
    with record() as ledger:
        token_stats(logits, labels).logp.sum().backward()
    names = [one.name for one in ledger.operations]
    assert names.count("fused_po::row_stats") == 1 and names.count("fused_po::row_grad_into") == 1


@pytest.mark.parametrize("method", ["linear_loss", "linear_token_stats"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_product_is_counted(method, softcap, frozen, autocast):
    case = PaperCase(method, frozen=frozen, autocast=autocast, softcap=softcap, **SHAPE)
    found = sheet(case)
    # everything fits: nothing is recomputed
    assert found.ledger.flops == case.bare
    assert found.ledger.waits == 0


def test_the_same_call_runs_on_a_device():
    found = measured(PaperCase("linear_loss", loss="dpo", dtype=torch.float32, **SHAPE), "cpu", 0.01)
    assert found["ms"] > 0 and found["over_bare"] == pytest.approx(found["ms"] / found["bare_ms"])


@pytest.mark.parametrize("name", CASES)
def test_no_route_is_dearer_than_it_was_recorded(name):
    """If a route is meant to cost more or less: python -m bench.record_paper."""
    recorded = routes()
    before = recorded["cases"][name]
    now = paper_table.figures(sheet(CASES[name]), device(recorded["on_paper"]))
    assert now["over_bare"] <= 1.02 * before["over_bare"]
    assert now["over_bare_launches"] <= 1.02 * before["over_bare_launches"]
    assert now["scratch_bytes"] <= 1.02 * before["scratch_bytes"]
    assert now["waits"] == 0


def test_peers_are_counted_where_torch_knows_cuda_and_else_recorded(monkeypatch):
    name = "stats-small"
    before = paper_peers.recorded("trl", name)
    assert before.ledger.flops == 2 * 2 * 512 * 4096 * 32000 + 2 * 2 * 512 * 4096 * 32000
    try:
        now = paper_peers.count("trl", CASES[name])
    except Absent as reason:
        assert torch.version.cuda is None or "rror" in str(reason)
    else:
        assert now.ledger.flops == before.ledger.flops
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Absent, match="CUDA build"):
        paper_peers.count("trl", CASES[name])
    found = paper_table.report({name: CASES[name]}, device("h200"))
    assert found["cases"][name]["peers"]["trl"]["recorded"] is True


def test_the_command_prints_the_table(tmp_path, capsys):
    file = tmp_path / "out" / "paper.json"
    options = ["--cases", "*-small", "--device", "cpu", "--output", str(file)]
    assert main(["bench", "--paper", "h100", *options, "--lines", "2"]) == 0
    out = capsys.readouterr().out
    assert "on paper, h100" in out and "stats-small" in out and "not run" in out and "ops/head.py" in out
    found = json.loads(file.read_text())
    assert list(found["cases"]) == ["dapo-small", "dpo-small", "stats-small"]
    assert main(["bench", "--gpu", "b200", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["on_paper"] == "b200"
    assert main(["bench", "--paper", "v100"]) == 2
    assert "wanted a100, h100, h200, b200" in capsys.readouterr().err
    assert main(["bench", "--paper", "h100", "--cases", "quick"]) == 2
    assert "no case 'quick' on paper" in capsys.readouterr().err


def test_cases_are_chosen_by_pattern():
    assert list(choose(["pair-*", "stats"])) == ["stats", "pair-16k", "pair-131k"]
    assert set(DEVICES) == {"a100", "h100", "h200", "b200"}
