"""Coverage-guided by atheris: ``python -m tests.fuzz.readers jsonl --seconds 60``; without a name, all in turn.

What raises, or takes longer than 20 s, is written into ``--crashes`` and ends its target with exit code 1. ``--replay
FILE`` runs bytes that were found. atheris is no requirement of ours: ``pip install atheris`` (Python 3.11 to 3.13).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

# nothing that bytes can spell is fetched
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
# memory of one input, in MiB
MOST_MEMORY = 6000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.readers", description=__doc__)
    parser.add_argument("target", nargs="*", help="default all")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz/corpus"), help="inputs that reached new code")
    parser.add_argument("--crashes", type=Path, default=Path(".fuzz/crashes"))
    parser.add_argument("--replay", type=Path, help="run this input alone, of one target")
    given = parser.parse_args()
    if given.replay is None and len(given.target) != 1:
        return of_all(given)
    name = given.target[0]
    if given.replay is not None:
        from tests.fuzz.readers.targets import TARGETS

        with tempfile.TemporaryDirectory() as folder:
            TARGETS[name].run(given.replay.read_bytes(), Path(folder))
        return 0
    guided(name, given)
    return 0


def of_all(given: argparse.Namespace) -> int:
    """Each target in a process of its own: the first crash ends one."""
    from tests.fuzz.readers.targets import TARGETS

    wrong = []
    for name in given.target or TARGETS:
        own = ["--seconds", str(given.seconds), "--corpus", str(given.corpus), "--crashes", str(given.crashes)]
        print(f"=== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "tests.fuzz.readers", name, *own]).returncode:
            wrong.append(name)
    print(f"failed: {', '.join(wrong)}" if wrong else "nothing found")
    return 1 if wrong else 0


def guided(name: str, given: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(include=["fused_po.cli", "fused_po.trainers", "fused_po.kernels.configs", "bench"]):
        from tests.fuzz.readers.targets import TARGETS

    import datasets

    datasets.disable_progress_bars()
    target = TARGETS[name]
    corpus, crashes = given.corpus / name, given.crashes / name
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = given.corpus / f"{name}.words"
    words.write_text("".join(f'"{escaped(word)}"\n' for word in target.words), encoding="ascii")
    # a bomb of a file must not take the machine along
    most = MOST_MEMORY << 20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    # files are written where memory holds them
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

    def run(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            try:
                target.run(data, Path(folder))
            except BaseException:
                # on a busy machine the fuzzer's own alarm may come before it has written them
                (crashes / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
                raise

    options = [f"-max_total_time={given.seconds}", "-timeout=20", f"-rss_limit_mb={MOST_MEMORY}", "-max_len=4096"]
    options += ["-len_control=0"]
    options += ["-print_final_stats=1", f"-artifact_prefix={crashes}/", "-report_slow_units=20"]
    options += [f"-dict={words}"] if target.words else []
    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


def escaped(word: str) -> str:
    return "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\x{b:02x}" for b in word.encode())


if __name__ == "__main__":
    sys.exit(main())
