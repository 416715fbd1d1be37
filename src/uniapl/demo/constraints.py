"""Prompts of the demo task: what they ask for, in words, and whether a text satisfies it.

Each prompt asks for a number of sentences about a topic, and for one to three extra constraints. The
combination of a prompt is the set of kinds of its extra constraints; some combinations occur in no training
prompt.
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
WORDINGS = {
    "include": "use {} .",
    "avoid": "do not use {} .",
    "end": "end with {} .",
    "twice": "use {} twice .",
    "place": "mention a place .",
    "max_words": "use at most {} words .",
}
EXTRAS = tuple(WORDINGS)
# They test whether instruction following generalises to combinations that training prompts do not have.
HELD_OUT_COMBINATIONS = frozenset(
    map(
        frozenset,
        [("include", "end"), ("avoid", "twice"), ("place", "max_words"), ("include", "place", "end")],
    )
)


@dataclass(frozen=True, order=True)
class Constraint:
    """One requirement of a prompt.

    Example:
        Constraint("include", "dark"), Constraint("sentences", 2), Constraint("avoid", "adverb")
    """

    kind: str
    argument: str | int = ""

    @property
    def wording(self) -> str:
        """The sentence of the prompt that states an extra constraint."""
        argument = NUMBERS[int(self.argument)] if self.kind == "max_words" else self.argument
        return WORDINGS[self.kind].format(argument)

    def satisfied_by(self, text: str) -> bool:
        """Whether a text satisfies the constraint. Only complete words count; full stops are not words."""
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
class TaskPrompt:
    """A request for a text.

    Example:
        "write two sentences about the farmer . use dark . mention a place ."
    """

    sentences: int
    topic: str
    extras: tuple[Constraint, ...]

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """All constraints, the number of sentences and the topic first."""
        return (Constraint("sentences", self.sentences), Constraint("topic", self.topic), *self.extras)

    @property
    def combination(self) -> frozenset[str]:
        """The kinds of the extra constraints."""
        return frozenset(extra.kind for extra in self.extras)

    @property
    def text(self) -> str:
        """The prompt in words."""
        noun = "sentence" if self.sentences == 1 else "sentences"
        request = f"write {NUMBERS[self.sentences]} {noun} about the {self.topic} ."
        return " ".join([request, *(extra.wording for extra in self.extras)])


def conflict(one: Constraint, other: Constraint) -> bool:
    """Whether two extra constraints exclude each other, or hardly any text satisfies both."""
    for a, b in ((one, other), (other, one)):
        if a.kind == "avoid" and a.argument in (CLASS_OF.get(str(b.argument)), b.kind):
            return True
    if {one.kind, other.kind} <= {"include", "twice", "end"} and one.argument == other.argument:
        return True
    return one.kind == other.kind


def feasible(prompt: TaskPrompt) -> bool:
    """Whether the word limit leaves enough room, and a word can occur twice in the number of sentences."""
    others = len(prompt.extras) - 1
    for extra in prompt.extras:
        if extra.kind == "max_words" and int(extra.argument) < 5 * prompt.sentences + 3 * others + 1:
            return False
        if extra.kind == "twice" and prompt.sentences == 1 and CLASS_OF[str(extra.argument)] != "adjective":
            return False
    return True


def draw_prompt(rng: random.Random, *, kinds: tuple[str, ...] | None = None) -> TaskPrompt:
    """A random prompt without conflicts; `kinds` fixes the kinds of its extra constraints."""
    while True:
        sentences, topic = rng.choice((1, 2, 3)), rng.choice(NOUNS)
        wanted = kinds or tuple(rng.sample(EXTRAS, rng.choice((1, 2, 3))))
        extras = tuple(_draw_extra(rng, kind) for kind in wanted)
        prompt = TaskPrompt(sentences=sentences, topic=topic, extras=extras)
        if feasible(prompt) and not any(conflict(a, b) for a, b in itertools.combinations(extras, 2)):
            return prompt


def draw_prompts(rng: random.Random, *, held_out: bool, seen: set[str]) -> Iterator[TaskPrompt]:
    """Endless distinct prompts that are not in `seen`, to which they are added.

    Args:
        held_out: Whether the prompts have held-out combinations; otherwise none of them does.
    """
    combinations = sorted(tuple(sorted(c)) for c in HELD_OUT_COMBINATIONS)
    while True:
        prompt = draw_prompt(rng, kinds=rng.choice(combinations) if held_out else None)
        if prompt.text not in seen and (prompt.combination in HELD_OUT_COMBINATIONS) == held_out:
            seen.add(prompt.text)
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
