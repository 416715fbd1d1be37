"""The demo task with tools: its tools, its questions and the table of facts.

A question is an arithmetic expression in words. Some of its terms are facts about people, which are only in
the table: "what is 37 times 24 plus the age of the king?"
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from uniapl.demo.language import NOUNS
from uniapl.types import derive_seed

QUANTITIES = ("age", "height", "debt")
OPERATIONS = {"plus": "+", "minus": "-", "times": "*"}
NUMBERS = range(11, 99)
"""The numbers in questions and in the table."""
HELD_OUT_PEOPLE = NOUNS[-6:]
"""People that occur in no training question: their facts must be looked up."""
PEOPLE = NOUNS[:-6]
EXPRESSION = re.compile(r"(\d+)((?: [-+*] \d+)*)")
UNKNOWN, UNREADABLE = "no such entry", "not an expression"
"""The errors of the tools."""

Fact = tuple[str, str]
"""A person and a quantity."""


def _table() -> Mapping[Fact, int]:
    rng = random.Random(derive_seed(0, "embedded", "facts"))
    return {fact: rng.choice(NUMBERS) for fact in itertools.product(NOUNS, QUANTITIES)}


TABLE = _table()


def lookup(name: str, quantity: str) -> int:
    """Look up a fact about a person.

    Args:
        name: The person, for example king.
        quantity: age, height or debt.
    """
    if (name, quantity) not in TABLE:
        raise ValueError(UNKNOWN)
    return TABLE[name, quantity]


def calculate(expression: str) -> int:
    """Calculate with whole numbers.

    Args:
        expression: Numbers with +, - or * between them, separated by spaces, for example 2 + 3 * 4.
    """
    match = EXPRESSION.fullmatch(expression)
    if match is None:
        raise ValueError(UNREADABLE)
    summands = [int(match[1])]
    parts = match[2].split()
    for sign, number in zip(parts[::2], parts[1::2], strict=True):
        if sign == "*":
            summands[-1] *= int(number)
        else:
            summands.append(int(sign + number))
    return sum(summands)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question.

    Example:
        Question(terms=(37, 24, ("king", "age")), operations=("times", "plus")) is
        "what is 37 times 24 plus the age of the king?"
    """

    terms: tuple[int | Fact, ...]
    operations: tuple[str, ...]
    """One between each two terms."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The terms that must be looked up."""
        return tuple(term for term in self.terms if isinstance(term, tuple))

    @property
    def text(self) -> str:
        """The question in words."""
        terms = [str(t) if isinstance(t, int) else f"the {t[1]} of the {t[0]}" for t in self.terms]
        return f"what is {_joined(terms, self.operations)}?"

    @property
    def answer(self) -> int:
        """The right answer."""
        return calculate(self.expression(TABLE))

    def expression(self, values: Mapping[Fact, int]) -> str:
        """The argument of `calculate`, with the values of the facts."""
        terms = [str(t if isinstance(t, int) else values[t]) for t in self.terms]
        return _joined(terms, [OPERATIONS[operation] for operation in self.operations])


def _joined(terms: Sequence[str], operations: Sequence[str]) -> str:
    rest = (f" {sign} {term}" for sign, term in zip(operations, terms[1:], strict=True))
    return "".join([terms[0], *rest])


def draw_question(rng: random.Random, people: Sequence[str], *, facts: int | None = None) -> Question:
    """A random question with two or three terms, of which up to two are facts about different people.

    Args:
        facts: The number of facts; None draws it.
    """
    count = rng.choice((2, 3))
    facts = rng.choice((0, 1, 2)) if facts is None else facts
    names = iter(rng.sample(people, facts))
    places = rng.sample(range(count), facts)
    terms = [
        (next(names), rng.choice(QUANTITIES)) if n in places else rng.choice(NUMBERS) for n in range(count)
    ]
    return Question(terms=tuple(terms), operations=tuple(rng.choice([*OPERATIONS]) for _ in range(count - 1)))


def draw_questions(
    rng: random.Random, people: Sequence[str], seen: set[str], *, facts: int | None = None
) -> Iterator[Question]:
    """Endless distinct questions that are not in `seen`, to which they are added."""
    while True:
        question = draw_question(rng, people, facts=facts)
        if question.text not in seen:
            seen.add(question.text)
            yield question
