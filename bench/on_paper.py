"""The section of docs/performance.md that shows a GPU on paper, beside what was measured of it."""

from __future__ import annotations

from bench import paper_g
from bench.prose import prose
from bench.record_paper import routes, trl_on
from fused_po.bench.paper import CASES, PaperCase
from fused_po.bench.paper_peers import counted_with
from fused_po.prices import device

__all__ = ["g_section", "paper_section"]

GIB = 1 << 30
NOT_RUN = "None of it has run on a GPU yet; `fused-po bench --paper h200` measures the cases where one is."


def paper_section() -> list[str]:
    """From bench/results/paper, which ``python -m bench.record_paper`` writes."""
    found, used = routes(), counted_with()
    on = device(found["on_paper"])
    ran = any(row["measured"] is not None for row in found["cases"].values())
    lines = [
        "## A GPU on paper",
        "",
        *prose(
            f"""Not measured but counted. Every operation of a forward and backward is listed on tensors with shapes
            and no values, and priced for an {on.name.upper()}: a product by its FLOP over {on.half / 1e12:.0f} TFLOP/s
            or by its bytes over {on.bandwidth / 1e12:.1f} TB/s, whichever takes longer, and on top by the bytes of an
            accumulator that it reads and writes again; all else by its bytes. The unit is the time of the bare products
            of the case, 3 or with a frozen head 2. Launches are counted and not priced. Scratch is the most memory in
            use beyond inputs and returned gradients. TRL's function is counted in the same way (trl {used["trl"]},
            torch {used["torch"]}). *At most* is this project's own limit, which a test holds."""
        ),
        "",
        *([] if ran else [NOT_RUN, ""]),
        "| case | at most | on paper | scratch GiB | launches | TRL on paper | TRL's scratch GiB |"
        + (" measured |" if ran else ""),
        "|---|---|---|---|---|---|---|" + ("---|" if ran else ""),
    ]
    for name, row in found["cases"].items():
        case, other = CASES[name], trl_on(on, name)
        limit = "" if case.limit is None else f"{case.limit:.2f} x"
        theirs = " | " if other is None else f"{other['over_bare']:.2f} x | {other['scratch_bytes'] / GIB:.2f}"
        got = "not run" if row["measured"] is None else f"{row['measured']['over_bare']:.2f} x"
        lines.append(
            f"| {_words(case)} | {limit} | {row['over_bare']:.2f} x | {row['scratch_bytes'] / GIB:.2f} | "
            f"{row['launches']} | {theirs} |" + (f" {got} |" if ran else "")
        )
    return [*lines, ""]


def g_section() -> list[str]:
    """From bench/results/paper/g.json, which ``python -m bench.paper_g`` writes."""
    lines = [
        "## G of a pretrained model, on paper",
        "",
        *prose(
            f"""Not measured but counted: the tensors at the peak of `fused-po g` (docs/g.md) in float32, the cosine
            included, on answers of {paper_g.TOKENS} tokens with their prompts. D and D' may hold any number of such
            batches, 128 pairs as well as 4. A CUDA context and the workspaces of libraries come on top. On a CPU the
            same count is within 10 % of what is allocated, which a test holds."""
        ),
        "",
        "| model | method | answers at once | peak GiB | of it the model |",
        "|---|---|---|---|---|",
    ]
    for name, methods in paper_g.read().items():
        for method, rows in methods.items():
            for answers, row in rows.items():
                lines.append(f"| {name} | {method} | {answers} | {row['peak'] / GIB:.1f} | {row['model'] / GIB:.1f} |")
    return [*lines, ""]


def _words(case: PaperCase) -> str:
    parts = [f"`{case.method}`"]
    if case.method == "linear_loss":
        parts.append({"dapo": "DAPO", "dpo": "DPO", "ppo-entropy": "PPO with an entropy bonus"}[case.loss])
    if case.entropy:
        parts.append("gradient through the entropy")
    if case.softcap is not None:
        parts.append("softcap")
    if case.frozen:
        parts.append("frozen head")
    dtype = str(case.dtype).removeprefix("torch.")
    parts.append(f"float32 weights under {dtype} autocast" if case.autocast else dtype)
    shape = f"N={case.tokens} H={case.hidden} V={case.vocab}"
    return ", ".join([*parts, shape if case.sequences > 2 else f"{shape}, one pair"])
