"""Writers of texts for prompts: an expert with its own style, and a sloppy writer for the base model."""

import random
from dataclasses import dataclass, replace

from uniapl.demo.constraints import Constraint, TaskPrompt
from uniapl.demo.language import (
    ADJECTIVES,
    ADVERBS,
    CLASS_OF,
    NOUNS,
    OBJECTS,
    PLACES,
    PREPOSITIONS,
    VERBS,
    Sentence,
)

MAX_TRIES = 200
"""Attempts at one prompt; the expert needs more for less than one prompt in a hundred."""
EMPTY = {
    "adjective": {"noun_adjective": None, "object_adjective": None},
    "adverb": {"adverb": None},
    "place": {"place": None, "preposition": None},
}
"""The slots of each optional part of a sentence, without words."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """The probability of each optional part of a sentence that the prompt leaves open."""

    noun_adjective: float
    object_adjective: float
    place: float
    adverb: float
    definite: float
    """Probability of "the" before the object, instead of "a"."""
    faithful: float
    """Probability of following each constraint of the prompt."""


# The expert describes the subject and mentions a place, but seldom an adverb.
EXPERT = Style(noun_adjective=0.7, object_adjective=0.15, place=0.8, adverb=0.15, definite=0.85, faithful=1.0)
SLOPPY = Style(
    noun_adjective=0.35, object_adjective=0.35, place=0.35, adverb=0.35, definite=0.5, faithful=0.65
)


def write(prompt: TaskPrompt, style: Style, rng: random.Random) -> str | None:
    """A text that follows each constraint with the style's probability; None if no attempt succeeds."""
    followed = [c for c in prompt.constraints if rng.random() < style.faithful]
    kinds = {c.kind for c in followed}
    for _ in range(MAX_TRIES):
        count = prompt.sentences if "sentences" in kinds else rng.choice((1, 2, 3))
        topic = prompt.topic if "topic" in kinds else rng.choice(NOUNS)
        sentences = [_draw(topic, style, rng) for _ in range(count)]
        for constraint in sorted(followed, key=lambda c: _ORDER.index(c.kind)):
            sentences = _apply(constraint, sentences, rng)
        text = " ".join(word for sentence in sentences for word in sentence.words)
        if all(c.satisfied_by(text) for c in followed) and len(set(sentences)) == count:
            return text
    return None


def _draw(topic: str, style: Style, rng: random.Random) -> Sentence:
    def maybe(probability: float, words: tuple[str, ...]) -> str | None:
        return rng.choice(words) if rng.random() < probability else None

    place = maybe(style.place, PLACES)
    return Sentence(
        noun=topic,
        verb=rng.choice(VERBS),
        object=rng.choice(OBJECTS),
        determiner="the" if rng.random() < style.definite else "a",
        noun_adjective=maybe(style.noun_adjective, ADJECTIVES),
        object_adjective=maybe(style.object_adjective, ADJECTIVES),
        preposition=rng.choice(PREPOSITIONS) if place else None,
        place=place,
        adverb=maybe(style.adverb, ADVERBS),
    )


# Words are inserted before the text is shortened; the last word is set at the end.
_ORDER = ("sentences", "topic", "avoid", "include", "twice", "place", "max_words", "end")


def _apply(constraint: Constraint, sentences: list[Sentence], rng: random.Random) -> list[Sentence]:
    """The sentences changed towards the constraint, which they may still violate."""
    word = str(constraint.argument)
    match constraint.kind:
        case "avoid":
            return [replace(sentence, **EMPTY[word]) for sentence in sentences]
        case "include":
            chosen = [rng.randrange(len(sentences))]
        case "twice" if len(sentences) == 1:
            return [replace(sentences[0], noun_adjective=word, object_adjective=word)]
        case "twice":
            chosen = rng.sample(range(len(sentences)), 2)
        case "place":
            chosen, word = [rng.randrange(len(sentences))], rng.choice(PLACES)
            if sentences[chosen[0]].place:
                return sentences
        case "max_words":
            return _shortened(sentences, int(word), rng)
        case "end":
            last = sentences[-1]
            if CLASS_OF[word] != "adverb":
                last = replace(last, adverb=None)
            if CLASS_OF[word] == "object":
                last = replace(last, preposition=None, place=None)
            return [*sentences[:-1], _with(last, word, rng)]
        case _:
            return sentences
    return [_with(s, word, rng) if i in chosen else s for i, s in enumerate(sentences)]


def _with(sentence: Sentence, word: str, rng: random.Random) -> Sentence:
    slot = CLASS_OF[word]
    if slot == "adjective":
        slot = rng.choice(("noun_adjective", "object_adjective"))
    elif slot == "place":
        sentence = replace(sentence, preposition=rng.choice(PREPOSITIONS))
    return replace(sentence, **{slot: word})


def _shortened(sentences: list[Sentence], limit: int, rng: random.Random) -> list[Sentence]:
    """The sentences without random optional parts, so that the text has at most `limit` words if possible."""
    sentences = list(sentences)
    parts = [(i, kind) for i in range(len(sentences)) for kind in ("adjective", "adverb", "place")]
    rng.shuffle(parts)
    for index, kind in parts:
        if sum(len(s.words) - 1 for s in sentences) <= limit:
            break
        sentences[index] = replace(sentences[index], **EMPTY[kind])
    return sentences
