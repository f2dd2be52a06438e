"""Write the preference set that the package ships: questions whose right answer is known, a good reply and a bad one.

A good reply is right, polite and no longer than its working; a bad one is wrong, rude, evasive, rambling or boastful.
The same seed gives the same bytes:

    python scripts/make_preferences.py --output fused_po/data
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from preference_texts import (
    BOASTFUL,
    CLOSINGS,
    CONVERSIONS,
    EVASIVE,
    FAMILIES,
    GOODS,
    HOW_TO,
    NAMES,
    OPENINGS,
    RAMBLING,
    REQUESTS,
    RUDE,
    TASKS,
    THINGS,
)

TRAIN, EVALUATION = 160, 32
FLAWS = ("wrong", "rude", "evasive", "rambling", "boastful")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WORDS = tuple(word for family in FAMILIES.values() for word in family)


class Question(NamedTuple):
    """A prompt with its right answer, the working that leads there, and an answer that is wrong."""

    prompt: str
    answer: str
    working: str
    wrong: str


def bill(rng: random.Random) -> Question:
    goods = rng.sample(GOODS, rng.randint(2, 6))
    lines = [(name, rng.randint(2, 9), rng.randint(2, 12)) for name in goods]
    total = sum(count * price for _, count, price in lines)
    buyer = rng.choice(NAMES)
    basket = _listed([f"{count} {name} at {price} euros each" for name, count, price in lines])
    steps = [f"the {name} cost {count} times {price}, that is {count * price} euros" for name, count, price in lines]
    sums = " + ".join(str(count * price) for _, count, price in lines)
    return Question(
        f"{buyer} buys {basket}. What does {buyer} pay in all?",
        f"{buyer} pays {total} euros.",
        f"I add up one line of the bill after the other: {_listed(steps)}. Together that is {sums} = {total}.",
        f"{buyer} pays {total + rng.choice((-11, -7, 9, 13))} euros.",
    )


def conversion(rng: random.Random) -> Question:
    one, large, small, factor = rng.choice(CONVERSIONS)
    amount = rng.randint(2, 40)
    return Question(
        f"Convert {amount} {large} to {small}.",
        f"{amount} {large} are {amount * factor} {small}.",
        f"One {one} is {factor} {small}, so I multiply {amount} by {factor}.",
        f"{amount} {large} are {amount * factor + factor // 2 + 1} {small}.",
    )


def alphabet(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(4, 9))
    ordered = sorted(words, key=str.lower)
    firsts = _listed([f"{word} with {word[:3]}" for word in ordered])
    return Question(
        f"Put these words into alphabetical order: {', '.join(words)}.",
        f"In alphabetical order: {', '.join(ordered)}.",
        f"Going by their first letters, I take {firsts}.",
        f"In alphabetical order: {', '.join(reversed(ordered))}.",
    )


def letters(rng: random.Random) -> Question:
    word = rng.choice([word for word in WORDS if len(word) > 4])
    count = sum(letter in "aeiou" for letter in word)
    vowels = ", ".join(letter for letter in word if letter in "aeiou")
    return Question(
        f'How many of the letters of "{word}" are vowels, counting a, e, i, o and u?',
        f'"{word}" has {count} vowel{"s" * (count != 1)} among its {len(word)} letters.',
        f"Spelled out it is {'-'.join(word)}. The vowels in it are {vowels}.",
        f'"{word}" has {count + rng.choice((1, 2))} vowels.',
    )


def duration(rng: random.Random) -> Question:
    past_the_hour, minutes = rng.randint(1, 59), rng.randint(65, 8 * 60)
    start, to_the_hour = 60 * rng.randint(5, 15) + past_the_hour, 60 - past_the_hour
    arrival = start + minutes
    vehicle = rng.choice(("train", "bus", "ferry"))
    left = minutes - to_the_hour
    return Question(
        f"A {vehicle} leaves at {_clock(start)} and arrives at {_clock(arrival)}. How long is the trip?",
        f"The trip takes {minutes // 60} h {minutes % 60} min.",
        f"From {_clock(start)} to the full hour it is {to_the_hour} min; from then until {_clock(arrival)} it is "
        f"{left // 60} h {left % 60} min more. Together that makes {minutes} minutes.",
        f"The trip takes {minutes // 60 + 1} h {(minutes + 25) % 60} min.",
    )


def weekday(rng: random.Random) -> Question:
    today, days = rng.randrange(7), rng.randint(9, 90)
    then = (today + days) % 7
    return Question(
        f"Today is {WEEKDAYS[today]}. Which day of the week is it {days} days from now?",
        f"It is a {WEEKDAYS[then]}.",
        f"Every seven days the weekday repeats. {days} days are {days // 7} full weeks and {days % 7} more days, "
        f"and {days % 7} days after {WEEKDAYS[today]} comes {WEEKDAYS[then]}.",
        f"It is a {WEEKDAYS[then - rng.randint(1, 3)]}.",
    )


def fractions(rng: random.Random) -> Question:
    b, d = rng.sample(range(5, 20), 2)
    a, c = rng.randint(2, b - 1), rng.randint(2, d - 1)
    # two fractions of the same value have no larger one
    if a * d == c * b:
        return fractions(rng)
    large, small = (f"{a}/{b}", f"{c}/{d}") if a * d > c * b else (f"{c}/{d}", f"{a}/{b}")
    return Question(
        f"Which is larger, {a}/{b} or {c}/{d}?",
        f"{large} is the larger one.",
        f"Over the common denominator {b * d}, {a}/{b} is {a * d}/{b * d} and {c}/{d} is {c * b}/{b * d}, "
        f"and {max(a * d, c * b)} is more than {min(a * d, c * b)}.",
        f"{small} is the larger one.",
    )


def sharing(rng: random.Random) -> Question:
    people, each = rng.randint(3, 12), rng.randint(3, 15)
    rest = rng.randrange(people)
    thing, total = rng.choice(THINGS), people * each + rest
    return Question(
        f"{rng.choice(NAMES)} shares {total} {thing} equally among {people} friends. "
        "How many does each get, and how many are left over?",
        f"Each friend gets {each} {thing}, with {rest} left over.",
        f"{people} times {each} is {people * each}, and {total} - {people * each} = {rest}, too few for another round.",
        f"Each friend gets {each - 1} {thing}, with {rest + 1} left over.",
    )


def odd_one_out(rng: random.Random) -> Question:
    family, other = rng.sample(sorted(FAMILIES), 2)
    stranger = rng.choice(FAMILIES[other])
    kin = rng.sample(FAMILIES[family], rng.randint(3, 5))
    words = rng.sample([*kin, stranger], len(kin) + 1)
    return Question(
        f"Which word does not belong with the others: {', '.join(words)}?",
        f"The odd one out is {stranger}.",
        f"{_listed(kin)} belong to the {family}, while {stranger} belongs to the {other}.",
        f"The odd one out is {rng.choice(kin)}.",
    )


def duties(rng: random.Random) -> Question:
    people = rng.sample(NAMES, rng.randint(3, 6))
    tasks = rng.sample(TASKS, len(people))
    items = [(name, task, rng.choice(WEEKDAYS)) for name, task in zip(people, tasks, strict=True)]
    note = " ".join(f"{name} said they would {task}, and it has to be done by {day}." for name, task, day in items)
    table = "".join(f"\n- {name}: {task} (by {day})" for name, task, day in items)
    mixed = "".join(f"\n- {name}: {items[at - 1][1]} (soon)" for at, (name, _, _) in enumerate(items))
    return Question(
        f"Make a list of who does what by when out of this note. {note}",
        f"Here is the list:{table}",
        f"The note names {len(items)} people with one task each.",
        f"Here is the list:{mixed}",
    )


def instructions() -> Iterator[Question]:
    for task, steps in HOW_TO.items():
        numbered = "".join(f"\n{at}. {step}" for at, step in enumerate(steps, 1))
        backwards = "".join(f"\n{at}. {step}" for at, step in enumerate(reversed(steps), 1))
        answer = f"You {task} in {len(steps)} steps:{numbered}"
        yield Question(f"How do I {task}?", answer, "", f"You just do this:{backwards}")


def requests() -> Iterator[Question]:
    for blunt, polite, harsh in REQUESTS:
        yield Question(f'Rewrite this message so that it is polite: "{blunt}"', f'"{polite}"', "", f'"{harsh}"')


def good(rng: random.Random, question: Question) -> str:
    """The right answer, mostly with its working."""
    return _framed(rng, question.answer, question.working if rng.random() < 0.7 else "")


def bad(rng: random.Random, question: Question, flaw: str) -> str:
    """An answer with one of ``FLAWS``; "wrong" has the manners of a good one, so only its content tells it apart."""
    if flaw == "wrong":
        return _framed(rng, question.wrong)
    if flaw == "rude":
        before, after = rng.sample(RUDE, 2)
        return _paragraph(f"{before} {question.wrong}", after)
    if flaw == "evasive":
        return " ".join(rng.sample(EVASIVE, rng.randint(2, 4)))
    if flaw == "boastful":
        boast, *more = rng.sample(BOASTFUL, 3)
        return _paragraph(f"{boast} {question.wrong}", " ".join(more))
    return " ".join(rng.sample(RAMBLING, rng.randint(5, 11)))


TOPICS: tuple[Callable[[random.Random], Question], ...] = (
    bill,
    conversion,
    alphabet,
    letters,
    duration,
    weekday,
    fractions,
    sharing,
    odd_one_out,
    duties,
)


def preferences(seed: int, count: int) -> list[dict[str, str]]:
    """``count`` rows of ``prompt``, ``chosen`` and ``rejected``, no prompt twice, topics and flaws mixed."""
    rng = random.Random(seed)
    questions = {question.prompt: question for question in (*instructions(), *requests())}
    while len(questions) < count:
        question = TOPICS[len(questions) % len(TOPICS)](rng)
        questions.setdefault(question.prompt, question)
    ordered = list(questions.values())
    rng.shuffle(ordered)
    return [
        {"prompt": q.prompt, "chosen": good(rng, q), "rejected": bad(rng, q, FLAWS[at % len(FLAWS)])}
        for at, q in enumerate(ordered)
    ]


def write(folder: Path, seed: int) -> None:
    """Write ``preferences.jsonl`` and the held-out ``preferences_eval.jsonl`` into ``folder``."""
    rows = preferences(seed, TRAIN + EVALUATION)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("preferences.jsonl", rows[:TRAIN]), ("preferences_eval.jsonl", rows[TRAIN:])):
        (folder / name).write_bytes("".join(json.dumps(row) + "\n" for row in part).encode())


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _framed(rng: random.Random, answer: str, working: str = "") -> str:
    reply = " ".join(part for part in (rng.choice(OPENINGS), working, answer) if part)
    closing = rng.choice(CLOSINGS)
    return _paragraph(reply, closing) if closing else reply


def _paragraph(text: str, sentence: str) -> str:
    """``sentence`` behind ``text``, on a line of its own if the text ends in a list."""
    return text + ("\n" if "\n" in text else " ") + sentence


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.output, arguments.seed)
