"""Many random problems: ``python -m tests.fuzz --count 10000 --seed 0 --backend reference``.

Prints each seed that fails with what was wrong, then a count; exits with 1 where one failed. ``--only SEED`` runs one
problem and prints it. ``--extreme`` takes extreme log-probs and side inputs, and compares losses with their documented
formulas in wide arithmetic.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

import torch

from fused_po import losses
from tests.fuzz.check import failures
from tests.fuzz.draw import NARROW, draw
from tests.fuzz.extreme import extreme_failures

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many problems")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--backend", default=None, help="of the kernels: reference, triton, ...; default the first")
    parser.add_argument("--dtype", choices=DTYPES, action="append", default=[], help="of the inputs; default all")
    parser.add_argument("--loss", choices=losses.names(), action="append", default=[], help="default all")
    parser.add_argument("--only", type=int, default=None, help="the seed of one problem to run and print")
    parser.add_argument("--extreme", action="store_true", help="losses on extreme numbers, by the reference")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    dtypes, names = tuple(DTYPES[name] for name in given.dtype), tuple(given.loss)
    if given.backend not in (None, "reference"):
        dtypes = dtypes or NARROW
    seeds = range(given.seed, given.seed + given.count) if given.only is None else [given.only]
    wrong = crashed = 0
    began = time.monotonic()
    for seed in seeds:
        words = f"seed {seed}"
        try:
            if given.extreme:
                words, found = extreme_failures(seed, names)
            else:
                problem = draw(seed, dtypes=dtypes, names=names)
                words = problem.describe()
                found = failures(problem, given.backend)
        except Exception:
            found = [traceback.format_exc()]
            crashed += 1
        if found or given.only is not None:
            print(words, *found, sep="\n    ", flush=True)
        wrong += bool(found)
        if found and given.stop:
            break
    seconds = time.monotonic() - began
    print(f"{len(seeds)} problems in {seconds:.0f} s: {wrong - crashed} wrong, {crashed} tracebacks")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
