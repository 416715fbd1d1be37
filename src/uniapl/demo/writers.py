"""Who writes for prompts: an expert with a manner of its own, and a sloppy writer for the base model."""

import random
from dataclasses import dataclass, replace

from uniapl.demo.constraints import Constraint, Prompt
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

TRIES = 200
"""Attempts at one prompt; the expert needs more for less than one prompt in a hundred."""


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a writer fills what the prompt leaves free: the probability of each optional part."""

    noun_adjective: float
    object_adjective: float
    place: float
    adverb: float
    definite: float
    """Of "the" before the object, rather than "a"."""
    faithful: float
    """Of heeding each of the prompt's constraints."""


# The expert describes who acts, says where, and seldom how.
EXPERT = Manner(
    noun_adjective=0.7, object_adjective=0.15, place=0.8, adverb=0.15, definite=0.85, faithful=1.0
)
SLOPPY = Manner(
    noun_adjective=0.35, object_adjective=0.35, place=0.35, adverb=0.35, definite=0.5, faithful=0.65
)


def write(prompt: Prompt, manner: Manner, rng: random.Random) -> str | None:
    """A text for the prompt, heeding each constraint with the manner's probability; None if no try fits."""
    heeded = [c for c in prompt.constraints if rng.random() < manner.faithful]
    kinds = {c.kind for c in heeded}
    for _ in range(TRIES):
        count = prompt.sentences if "sentences" in kinds else rng.choice((1, 2, 3))
        topic = prompt.topic if "topic" in kinds else rng.choice(NOUNS)
        sentences = [_draw(topic, manner, rng) for _ in range(count)]
        for constraint in sorted(heeded, key=lambda c: _ORDER.index(c.kind)):
            sentences = _apply(constraint, sentences, rng)
        text = " ".join(word for sentence in sentences for word in sentence.words)
        if all(c.satisfied_by(text) for c in heeded) and len(set(sentences)) == count:
            return text
    return None


def _draw(topic: str, manner: Manner, rng: random.Random) -> Sentence:
    def maybe(probability: float, words: tuple[str, ...]) -> str | None:
        return rng.choice(words) if rng.random() < probability else None

    place = maybe(manner.place, PLACES)
    return Sentence(
        noun=topic,
        verb=rng.choice(VERBS),
        object=rng.choice(OBJECTS),
        determiner="the" if rng.random() < manner.definite else "a",
        noun_adjective=maybe(manner.noun_adjective, ADJECTIVES),
        object_adjective=maybe(manner.object_adjective, ADJECTIVES),
        preposition=rng.choice(PREPOSITIONS) if place else None,
        place=place,
        adverb=maybe(manner.adverb, ADVERBS),
    )


# Words are put in before the text is shortened; the last word is set at the very end.
_ORDER = ("sentences", "topic", "avoid", "include", "twice", "place", "max_words", "end")


def _apply(constraint: Constraint, sentences: list[Sentence], rng: random.Random) -> list[Sentence]:
    """The sentences changed towards a constraint; the writer checks afterwards whether that was enough."""
    argument = str(constraint.argument)
    match constraint.kind:
        case "avoid":
            return [_without(sentence, argument) for sentence in sentences]
        case "include":
            chosen = rng.randrange(len(sentences))
            return [_with(s, argument, rng) if i == chosen else s for i, s in enumerate(sentences)]
        case "twice" if len(sentences) == 1:
            return [replace(sentences[0], noun_adjective=argument, object_adjective=argument)]
        case "twice":
            chosen_two = rng.sample(range(len(sentences)), 2)
            return [_with(s, argument, rng) if i in chosen_two else s for i, s in enumerate(sentences)]
        case "place":
            chosen = rng.randrange(len(sentences))
            word = rng.choice(PLACES)
            return [
                _with(s, word, rng) if i == chosen and not s.place else s for i, s in enumerate(sentences)
            ]
        case "max_words":
            return _shortened(sentences, int(constraint.argument), rng)
        case "end":
            last = sentences[-1]
            if CLASS_OF[argument] != "adverb":
                last = replace(last, adverb=None)
            if CLASS_OF[argument] == "object":
                last = replace(last, preposition=None, place=None)
            return [*sentences[:-1], _with(last, argument, rng)]
        case _:
            return sentences


def _with(sentence: Sentence, word: str, rng: random.Random) -> Sentence:
    match CLASS_OF[word]:
        case "adjective":
            slot = rng.choice(("noun_adjective", "object_adjective"))
            return replace(sentence, **{slot: word})
        case "place":
            return replace(sentence, place=word, preposition=rng.choice(PREPOSITIONS))
        case slot:
            return replace(sentence, **{slot: word})


def _without(sentence: Sentence, kind: str) -> Sentence:
    match kind:
        case "adjective":
            return replace(sentence, noun_adjective=None, object_adjective=None)
        case "place":
            return replace(sentence, place=None, preposition=None)
        case _:
            return replace(sentence, adverb=None)


def _shortened(sentences: list[Sentence], limit: int, rng: random.Random) -> list[Sentence]:
    """Optional parts dropped at random until the text has at most `limit` words."""
    sentences = list(sentences)
    parts = [(i, kind) for i in range(len(sentences)) for kind in ("adjective", "adverb", "place")]
    rng.shuffle(parts)
    for index, kind in parts:
        if sum(len(s.words) - 1 for s in sentences) <= limit:
            break
        sentences[index] = _without(sentences[index], kind)
    return sentences
