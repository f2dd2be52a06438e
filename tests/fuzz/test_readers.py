"""The targets of the reader fuzzer, without atheris: seeds, seeds with random changes, and what was found once."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.readers.preferences import CHAT, PAIRS, SINGLE, lines
from tests.fuzz.readers.studies import ROLLOUT
from tests.fuzz.readers.targets import TARGETS

CHANGED = 8


def row(**changes) -> bytes:
    return lines([PAIRS[0] | changes])


def cut(name: str, seed: int, old: bytes, new: bytes) -> bytes:
    data = TARGETS[name].seeds[seed]
    assert old in data
    return data.replace(old, new)


CONTENT = [{"role": "user", "content": {"a": 1}}]
# each of them ended in a traceback, or was read wrongly
FOUND = {
    "an answer alone, which is the rejected one": ("jsonl", lines([{"prompt": "a", "rejected": "b"}])),
    "a pair, then a single answer": ("jsonl", lines([*PAIRS, *SINGLE])),
    "a single answer, then a pair": ("jsonl", lines([*SINGLE, *PAIRS])),
    "contents that are no text": ("jsonl", lines([CHAT[0] | {"prompt": CONTENT}])),
    "a message without contents": ("jsonl", lines([CHAT[0] | {"chosen": [{"role": "assistant"}]}])),
    "turns that are strings": ("jsonl", row(conversations=["a"])),
    "text that is no UTF-8 in a table": ("parquet", cut("parquet", 0, b"Yes, it is.", b"Yes, it \xff\xff.")),
    "text that is no UTF-8 in a stream": ("arrow", cut("arrow", 0, b"Yes, it is.", b"Yes, it \xff\xff.")),
    "settings that are a list": ("settings", b"[]"),
    "settings nested deeply": ("settings", b"[" * 100_000),
    "weights that are none": ("model", b"\x03\x00{}"),
    "a tokenizer without parts": ("model", b"\x04\x00{}"),
    "a tokenizer of another kind": ("model", b"\x04\x02\x00\x20\x03[]"),
    "an adapter that is none": ("adapter", b"\x02\x00{}"),
    "a checkpoint whose config is none": ("checkpoints", b"\x01\x01{}"),
    "a checkpoint whose tokenizer is none": ("checkpoints", b"\x04\x00{}"),
    "a run that is a list": ("targets", b"[]"),
    "a run of no UTF-8": ("targets", TARGETS["targets"].seeds[0].replace(b"NVIDIA", b"\xff" * 2000)),
    "a tuner's run that is a list": ("tune", b"[]"),
    "flags nested deeply": ("config", b"[" * 5000),
    "an engine that is not installed": ("words", b"train\n--output\nx\n--deepspeed\n{}"),
    "numbers of a study without their columns": ("store", b"\x00\x01{}"),
    "settings of a study that are a list": ("store", b"\x03\x00[]"),
    "a run of a study without its settings": ("pool", b"\x02\x00{}"),
    "points that are no rows": ("pool", b"\x01\x00[]\n"),
    "rollouts with another separator": ("rollouts", ROLLOUT.replace(b"\n", b"\x0c\n") + ROLLOUT),
    "rollouts nested deeply": ("rollouts", b"[" * 100_000),
    "a table without a default": ("table", b"{}"),
    "a table of no UTF-8": ("table", b"\xff"),
}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(tmp_path, what):
    name, data = FOUND[what]
    TARGETS[name].run(data, tmp_path)


def changed(data: bytes, words: tuple[str, ...], draw: random.Random) -> bytes:
    """Some bytes replaced, taken out or put in."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(found))
        new = draw.choice([draw.randbytes(draw.randint(0, 3)), draw.choice(words or ("",)).encode()])
        found[place : place + draw.choice([0, 1, 3, 20])] = new
    return bytes(found)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_changed_ones(tmp_path, name):
    target, draw = TARGETS[name], random.Random(name)
    inputs = draw.sample(target.seeds, min(len(target.seeds), 10))
    inputs += [changed(draw.choice(target.seeds), target.words, draw) for _ in range(CHANGED)]
    for number, data in enumerate(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            target.run(data, folder)
        except BaseException as error:
            raise AssertionError(f"{name}: {data!r}") from error
