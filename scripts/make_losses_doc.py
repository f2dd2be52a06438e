"""Write docs/losses.md and its plots from the registry of losses and their docstrings.

python scripts/make_losses_doc.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from fused_po import losses
from fused_po.losses.batch import OPTIONAL
from fused_po.losses.pairwise import PairLoss, ReferenceLoss
from fused_po.losses.policy import PolicyLoss
from fused_po.losses.unpaired import UnpairedLoss
from fused_po.ops.batches import Layout, call_batch
from fused_po.ops.coefficients import coefficients
from fused_po.ops.planning import make_plan
from fused_po.pictures import png
from fused_po.stats import STATISTICS, Stats

DOCS = Path(__file__).resolve().parent.parent / "docs"

HEAD = """# Losses

Written by `python scripts/make_losses_doc.py` from the registry; the docstrings say more:
`help(type(losses.create("ipo")))`.

Make one with `fused_po.losses.create(name, **hyperparameters)`, or a weighted sum with `create(["sigmoid", "sft"],
loss_weights=[1.0, 0.2])`. Names and defaults of hyper-parameters are TRL's where TRL has the loss.

- **a, d**: summed log-probs of the chosen and the rejected answer; **u, v**: their log-ratios to the reference;
  **h = u \u2212 v**; **len**: loss tokens of an answer; **r**: ratio of the policy to the one that sampled, **R** that
  of a whole sequence; **A**: advantage; **π**: probability of the token; **\u03c3**: sigmoid; **sg**: no gradient
  flows; **q**: `label_smoothing`; **β, ε, ...**: the hyper-parameters of these names. In *italics*: what the
  values are summed over and divided by, with the default hyper-parameters.
- **Horizon**: what must be seen whole, and is never cut. **Reads**: statistics and side inputs, optional ones in
  brackets.
- **GEMMs**: with a trainable head / with a frozen one. The third number, where there is one, is that of a horizon
  larger than `scratch_bytes`; losses without it keep 3 there: token by token, or because their coefficients are one
  number times a pattern.
- **Plots**: -dL/dlogp, how hard a step pushes the log-prob up, with the default hyper-parameters. Pairs: over the
  margin, chosen solid, rejected dashed, answers of one token, u = -v (without a reference: log-probs around -3).
  Single answers: over u, desirable solid. Policy losses: over r, A = 1 solid, A = -1 dashed.
"""

MICRO_BATCHES = """## Micro-batches

A call counts what it divides by from its own labels. Where a batch is cut into micro-batches, or spread over ranks,
give the counts of the whole (over the number of ranks, where their gradients are averaged):

| argument | counts | read by |
|---|---|---|
| `num_items` | loss tokens | means over tokens: `dapo`, `ppo`, `sft`, ..., and every entropy bonus |
| `num_sequences` | sequences, twice the pairs | means over answers and pairs: `sigmoid`, `kto`, `grpo`, ... |
| `num_chosen_items` | loss tokens of chosen answers | the NLL of `cpo`, `orpo` and of `sft` with `paired=True` |

The gradients then add up to that of the full batch, if pairs stay together. They do not for

- any loss with `top_entropy_quantile` below 1, `bco` and `bco_pair` with `shift_weight` below 1: the quantile or the
  mean is that of one call;
"""

FAMILIES = {
    "Pairs: DPO and what is done to its margin": ("pairwise",),
    "Pairs: an aim for each side": ("pairwise_sides",),
    "Pairs: across the batch": ("pairwise_batch",),
    "Pairs: no reference": ("reference_free",),
    "Single answers": ("unpaired",),
    "Tokens with advantages: PPO": ("policy", "covariance"),
    "Tokens with advantages: GRPO": ("grpo",),
    "Tokens with advantages: REINFORCE": ("reinforce",),
    "Supervised": ("sft",),
}


def summary(loss: losses.Loss) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(type(loss)) or "").split("\n\n")[0].split())


def formulas(loss: losses.Loss) -> list[tuple[str, str]]:
    """The formulas of the docstring as they are written there, each with the words that say where it holds."""
    found = re.findall(r"``(.+?)``((?: (?:on|where|with|without|of the) [^,;:(`]+)?)", summary(loss))
    # others are names of arguments and classes
    return [(code, words.strip().rstrip(".")) for code, words in found if re.search(r"[ (]", code)]


# longest first; words of a formula and what stands for them on paper
_SYMBOLS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"epsilon_high": "ε<sub>high</sub>",
    r"(?:cpo_alpha|ppo_kl_coef|delta_v|dual_clip)": r"<code>\g<0></code>",
    r"stopgrad": "sg",
    r"mean_t\b": "mean<sub>t</sub>",
    r"\bw_([DU])\b": r"w<sub>\1</sub>",
    r"\b([sApra])_(t|ref)\b": r"\1<sub>\2</sub>",
    r"\bd_ref\b": "d<sub>ref</sub>",
    r"\blog p<sub>t</sub>": "log p<sub>t</sub>",
    r"len([+-])": lambda found: f"len<sub>{_minus(found[1])}</sub>",
    r"\b([rP])([+-])(?=[ )]|$)": lambda found: f"{found[1]}<sub>{_minus(found[2])}</sub>",
    r"e\^\{([^}]*)\}": r"e<sup>\1</sup>",
    r"e\^(-?\w+)": r"e<sup>\1</sup>",
    r"\^2": "²",
    r"\bsigmoid": "\u03c3",
    r"\bz0\b": "z<sub>0</sub>",
    r"\bphi\b": "φ",
    r"\bpi\b": "π",
    **{
        rf"(?<!_)\b{name}\b": sign
        for name, sign in zip(("alpha", "beta", "gamma", "epsilon", "lambda", "tau"), "αβγελτ", strict=True)
    },
}


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def typeset(formula: str) -> str:
    """A formula in letters and signs that every page shows: Greek, subscripts, a minus that is one."""
    for pattern, sign in _SYMBOLS.items():
        formula = re.sub(pattern, sign, formula)
    # a hyphen between letters is one
    formula = re.sub(r"(?<![A-Za-z])-|-(?![A-Za-z])", "\u2212", formula)
    return formula.replace("|", "\u2223").replace("*", "·")


def equation(loss: losses.Loss) -> str:
    """What the docstring gives as formulas, and what their sum is divided by."""
    lines = [typeset(code) + (f", {typeset(words)}" if words else "") for code, words in formulas(loss)]
    return "<br>".join([*lines, f"*{normaliser(loss)}*"])


def normaliser(loss: losses.Loss) -> str:
    """What the values of a loss are divided by, found from the weight that it gives each token of a call."""
    if isinstance(loss, PairLoss):
        return "mean over pairs"
    if isinstance(loss, UnpairedLoss):
        return "mean over answers"
    if not isinstance(loss, PolicyLoss):
        return "mean over loss tokens (of chosen answers, if paired)"
    labels = torch.tensor([[0, -100, -100], [0, 0, 0]])
    plan = make_plan(labels)
    shares = []
    for count in (None, 8):
        values = torch.ones(4, dtype=torch.float64, requires_grad=True)
        batch = call_batch(Layout.of(labels, plan), {}, count, None, torch.float64)
        loss.aggregate(values, batch).backward()
        shares.append(None if values.grad is None else values.grad.tolist())
    first, given = shares
    if first == [0.25] * 4:
        return (
            "mean over loss tokens, of all calls if `num_items` is given"
            if given != first
            else "mean over the call's loss tokens"
        )
    means, sums = [0.5, *[1 / 6] * 3], [0.5] * 4
    if torch.allclose(torch.tensor(first), torch.tensor(means)):
        return "mean over sequences of their token means"
    if first == sums:
        return "mean over sequences of their token sums"
    if first == [one / getattr(loss, "max_completion_length", 1) for one in sums]:
        return "sum over tokens, divided by sequences · `max_completion_length`"
    raise AssertionError(f"{loss.name} divides by something that has no name here: {first}")


def paper(loss: losses.Loss) -> str:
    """Where the docstring says the loss comes from."""
    ids = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", summary(loss)))
    links = [f"[{one}](https://arxiv.org/abs/{one})" for one in ids]
    named = re.search(r"\((Mitchell, .+?, \d{4})\)", summary(loss))
    return ", ".join(links) or (named.group(1) if named else "TRL's `SFTTrainer`")


def gemms(loss: losses.Loss) -> str:
    """GEMMs with a trainable and a frozen head, and of a horizon beyond the budget where it costs more."""
    batch = _call(loss, torch.full((2, 1), -1.0), {})[1]
    cheap = loss.horizon == "token" or loss.pattern(batch) is not None
    return "3 / 2" if cheap else "3 / 2, 4"


def reads(loss: losses.Loss) -> str:
    needed = [name for name in (*STATISTICS, *sorted(loss.needs - set(STATISTICS))) if name in loss.needs]
    return ", ".join(f"[`{name}`]" if name in OPTIONAL else f"`{name}`" for name in needed)


def table() -> str:
    """The whole page."""
    blocks = [HEAD]
    made = [losses.create(name) for name in losses.names()]
    for title, modules in FAMILIES.items():
        rows = ["| name | loss | source | horizon | reads | GEMMs | -dL/dlogp |", "|---|---|---|---|---|---|---|"]
        for loss in made:
            if type(loss).__module__.rsplit(".", 1)[1] in modules:
                given = ", ".join(f"{f.name} {_shown(getattr(loss, f.name))}" for f in fields(loss) if f.init)
                rows.append(
                    f"| **`{loss.name}`**<br>{given} | {equation(loss)} | {paper(loss)} | {loss.horizon} "
                    f"| {reads(loss)} | {gemms(loss)} | ![](losses/{loss.name}.png) |"
                )
        blocks.append(f"## {title}\n\n" + "\n".join(rows) + "\n")
    blocks.append(micro_batches(made))
    return "\n".join(blocks)


def micro_batches(made: list[losses.Loss]) -> str:
    """What is said of gradient accumulation."""
    reasons: dict[str, list[str]] = {}
    for loss in made:
        if loss.not_additive is not None:
            reasons.setdefault(loss.not_additive, []).append(f"`{loss.name}`")
    return MICRO_BATCHES + "\n".join(f"- {', '.join(names)}: {why}." for why, names in reasons.items()) + "\n"


def _shown(value: object) -> str:
    return f"`{value}`".replace("'", "")


def _call(loss: losses.Loss, logp: Tensor, given: dict[str, Tensor]) -> tuple[Stats, losses.Batch]:
    labels = torch.zeros(logp.shape, dtype=torch.int64)
    layout = Layout.of(labels, make_plan(labels))
    batch = call_batch(layout, given, None, None, torch.float64)
    flat = logp.reshape(-1).double()
    stats = Stats(flat, torch.ones_like(flat), flat, flat, flat > -1, -torch.ones_like(flat))
    return stats, batch


def curves(loss: losses.Loss) -> tuple[list[float], list[float], list[float], str]:
    """x, the push on chosen (desirable, A > 0) and on the others, and what x is."""
    xs: list[float] = []
    ups: list[float] = []
    downs: list[float] = []
    policy = "advantage" in loss.needs
    grid = torch.linspace(0.05, 2.5, 99) if policy else torch.linspace(-1.0, 1.0, 81)
    for point in grid.tolist():
        if policy:
            label, x = "r", point
            logp = torch.full((2, 1), -1.0)
            given = {"advantage": torch.tensor([1.0, -1.0])}
            if "old_logp" in loss.needs:
                given["old_logp"] = logp.double() - torch.tensor(point).double().log()
        elif "desirable" in loss.needs:
            label, x = "u", 40 * point
            logp = torch.full((2, 1), x - 50)
            given = {"ref_logp": torch.full((2,), -50.0), "desirable": torch.tensor([True, False])}
            if "kl" in loss.needs:
                given["kl"] = torch.tensor(0.0)
        elif isinstance(loss, ReferenceLoss):
            label, x = "h", 40 * point
            logp = torch.tensor([[x / 2 - 50], [-x / 2 - 50]])
            given = {"ref_logp": torch.full((2,), -50.0)}
        else:
            label, x = "a - d", 5 * point
            logp, given = torch.tensor([[x / 2 - 3], [-x / 2 - 3]]), {}
        stats, batch = _call(loss, logp, given)
        c = coefficients(loss, stats, batch)[1].logp
        assert c is not None
        xs.append(x)
        ups.append(-c[0].item())
        downs.append(-c[1].item())
    return xs, ups, downs, label


def plot(loss: losses.Loss, path: Path) -> None:
    """The coefficient, small."""
    xs, ups, downs, label = curves(loss)
    figure, axes = plt.subplots(figsize=(1.9, 1.2), layout="constrained")
    axes.axhline(0, color="0.8", linewidth=0.6)
    axes.plot(xs, ups, color="#1b6ca8", linewidth=1.2)
    axes.plot(xs, downs, color="#c0392b", linewidth=1.2, linestyle="--")
    axes.set_xlabel(label, fontsize=6, labelpad=1)
    axes.tick_params(labelsize=5, length=2, pad=1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.write_bytes(png(figure, dpi=130))
    plt.close(figure)


def main() -> None:
    (DOCS / "losses.md").write_text(table())
    folder = DOCS / "losses"
    folder.mkdir(exist_ok=True)
    for name in losses.names():
        plot(losses.create(name), folder / f"{name}.png")
    for path in folder.iterdir():
        if path.stem not in losses.names():
            path.unlink()


if __name__ == "__main__":
    main()
