"""Prompts of the small language: what they ask for, how they say it, and whether a text does it.

Every prompt asks for a number of sentences about a topic, and for one to three of the extras below. A
combination of extras is the set of their kinds; some combinations occur in no training prompt.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from uniapl.demo.language import ADJECTIVES, ADVERBS, CLASS_OF, CLASSES, NOUNS, OBJECTS, PLACES

NUMBERS = {
    1: "one", 2: "two", 3: "three", 6: "six", 8: "eight", 10: "ten", 12: "twelve", 14: "fourteen",
    16: "sixteen", 18: "eighteen", 20: "twenty", 24: "twentyfour",
}  # fmt: skip
AVOIDABLE = ("adjective", "adverb", "place")
EXTRAS = ("include", "avoid", "end", "twice", "place", "max_words")
# Seen in no training prompt: whether following instructions generalises to new combinations.
HELD_OUT_COMBINATIONS = frozenset(
    map(
        frozenset,
        [("include", "end"), ("avoid", "twice"), ("place", "max_words"), ("include", "place", "end")],
    )
)


@dataclass(frozen=True, order=True)
class Constraint:
    """One thing that a prompt asks for.

    Example:
        Constraint("include", "dark"), Constraint("sentences", 2), Constraint("avoid", "adverb")
    """

    kind: str
    argument: str | int = ""

    @property
    def wording(self) -> str:
        """How a prompt says it (the number of sentences and the topic are said together, by the prompt)."""
        match self.kind:
            case "include":
                return f"use {self.argument} ."
            case "avoid":
                return f"do not use {self.argument} ."
            case "end":
                return f"end with {self.argument} ."
            case "twice":
                return f"use {self.argument} twice ."
            case "place":
                return "mention a place ."
            case "max_words":
                return f"use at most {NUMBERS[int(self.argument)]} words ."
            case _:
                raise ValueError(f"{self.kind} has no wording of its own")

    def satisfied_by(self, text: str) -> bool:
        """Whether a text does it. Words are compared whole; full stops are not words."""
        words = [word for word in text.split() if word != "."]
        match self.kind:
            case "sentences":
                return text.split().count(".") == self.argument and text.split()[-1:] == ["."]
            case "topic" | "include":
                return self.argument in words
            case "avoid":
                return bool(words) and not any(word in CLASSES[str(self.argument)] for word in words)
            case "end":
                return words[-1:] == [self.argument]
            case "twice":
                return words.count(str(self.argument)) == 2
            case "place":
                return any(word in PLACES for word in words)
            case "max_words":
                return 0 < len(words) <= int(self.argument)
            case _:
                raise ValueError(f"unknown constraint '{self.kind}'")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request for a text.

    Example:
        "write two sentences about the farmer . use dark . mention a place ."
    """

    sentences: int
    topic: str
    extras: tuple[Constraint, ...]

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Everything asked for, the number of sentences and the topic first."""
        return (Constraint("sentences", self.sentences), Constraint("topic", self.topic), *self.extras)

    @property
    def combination(self) -> frozenset[str]:
        """The kinds of its extras."""
        return frozenset(extra.kind for extra in self.extras)

    @property
    def text(self) -> str:
        """The prompt in words."""
        noun = "sentence" if self.sentences == 1 else "sentences"
        request = f"write {NUMBERS[self.sentences]} {noun} about the {self.topic} ."
        return " ".join([request, *(extra.wording for extra in self.extras)])


def conflict(one: Constraint, other: Constraint) -> bool:
    """Whether two extras are never asked for together: no text, or hardly any, could do both."""
    for a, b in ((one, other), (other, one)):
        if a.kind == "avoid":
            if b.kind == "place" and a.argument == "place":
                return True
            if CLASS_OF.get(str(b.argument)) == a.argument:
                return True
        if {a.kind, b.kind} <= {"include", "twice", "end"} and a.argument == b.argument:
            return True
    return one.kind == other.kind


def feasible(prompt: Prompt) -> bool:
    """Whether the word limit leaves room, and a word can stand twice in so many sentences."""
    for extra in prompt.extras:
        others = len(prompt.extras) - 1
        if extra.kind == "max_words" and int(extra.argument) < 5 * prompt.sentences + 3 * others + 1:
            return False
        if extra.kind == "twice" and prompt.sentences == 1 and CLASS_OF[str(extra.argument)] != "adjective":
            return False
    return True


def draw_prompt(rng: random.Random, *, kinds: tuple[str, ...] | None = None) -> Prompt:
    """A random prompt without conflicts; `kinds` fixes which extras it has."""
    while True:
        sentences, topic = rng.choice((1, 2, 3)), rng.choice(NOUNS)
        wanted = kinds or tuple(rng.sample(EXTRAS, rng.choice((1, 2, 3))))
        extras = tuple(_draw_extra(rng, kind) for kind in wanted)
        prompt = Prompt(sentences=sentences, topic=topic, extras=extras)
        if feasible(prompt) and not any(conflict(a, b) for a, b in itertools.combinations(extras, 2)):
            return prompt


def draw_prompts(rng: random.Random, count: int, *, held_out: bool, seen: set[str]) -> Iterator[Prompt]:
    """Distinct prompts that are not in `seen`, which grows; all of held-out combinations, or none of them."""
    combinations = sorted(tuple(sorted(c)) for c in HELD_OUT_COMBINATIONS)
    while count:
        prompt = draw_prompt(rng, kinds=rng.choice(combinations) if held_out else None)
        if prompt.text not in seen and (prompt.combination in HELD_OUT_COMBINATIONS) == held_out:
            seen.add(prompt.text)
            count -= 1
            yield prompt


def _draw_extra(rng: random.Random, kind: str) -> Constraint:
    match kind:
        case "include" | "twice":
            return Constraint(kind, rng.choice((*ADJECTIVES, *ADVERBS, *OBJECTS, *PLACES)))
        case "avoid":
            return Constraint(kind, rng.choice(AVOIDABLE))
        case "end":
            return Constraint(kind, rng.choice((*ADVERBS, *OBJECTS, *PLACES)))
        case "max_words":
            return Constraint(kind, rng.choice([n for n in NUMBERS if n >= 6]))
        case _:
            return Constraint(kind)
