"""The language of the demo task: its words, its sentence pattern, and a parser.

    the [ADJECTIVE] NOUN VERB (the | a) [ADJECTIVE] OBJECT [PREPOSITION the PLACE] [ADVERB] .

Texts are words separated by spaces; the full stop is a separate word.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORDS = {
    "noun": "farmer teacher doctor sailor painter baker singer soldier hunter judge king queen "
    "child monk pilot clerk nurse poet guard miner butcher gardener fisher tailor",
    "verb": "saw found took lost kept sold made bought carried cleaned dropped followed "
    "forgot held hid opened painted pushed raised showed stole threw watched wanted",
    "object": "apple basket boat book bottle box candle chair clock coat coin cup "
    "door drum flag hat key knife lamp letter map ring rope wheel",
    "place": "barn bridge castle church forest garden harbor hill market mill river tower",
    "adjective": "old young dark bright quiet loud small large heavy light clever foolish "
    "brave gentle proud tired empty broken golden wooden",
    "adverb": "slowly quickly softly again often rarely proudly sadly gladly calmly today early",
}
CLASSES = {name: tuple(words.split()) for name, words in WORDS.items()}
NOUNS, VERBS, OBJECTS, PLACES, ADJECTIVES, ADVERBS = CLASSES.values()
PREPOSITIONS = ("in", "near", "behind", "beside")
DETERMINERS = ("the", "a")
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}


def _slot(name: str, words: Sequence[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)}) "


PATTERN = re.compile(
    f"the (?:{_slot('noun_adjective', ADJECTIVES)})?{_slot('noun', NOUNS)}{_slot('verb', VERBS)}"
    f"{_slot('determiner', DETERMINERS)}"
    f"(?:{_slot('object_adjective', ADJECTIVES)})?{_slot('object', OBJECTS)}"
    f"(?:{_slot('preposition', PREPOSITIONS)}the {_slot('place', PLACES)})?(?:{_slot('adverb', ADVERBS)})?\\."
)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """The slots of a well-formed sentence.

    Example:
        Sentence(noun="farmer", verb="saw", object="boat", place="river", preposition="near") is
        "the farmer saw the boat near the river ."
    """

    noun: str
    verb: str
    object: str
    determiner: str = "the"
    noun_adjective: str | None = None
    object_adjective: str | None = None
    preposition: str | None = None
    place: str | None = None
    adverb: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the sentence, with the full stop."""
        slots = ("the", self.noun_adjective, self.noun, self.verb)
        slots += (self.determiner, self.object_adjective, self.object)
        slots += (self.preposition, "the", self.place) if self.place else ()
        return tuple(word for word in (*slots, self.adverb, ".") if word is not None)


def parse(words: Sequence[str]) -> Sentence | None:
    """The sentence with these words, which include the full stop; None if they are not well formed.

    Example:
        >>> parse("the king lost a golden ring .".split()).object_adjective
        'golden'
    """
    match = PATTERN.fullmatch(" ".join(words))
    return Sentence(**match.groupdict()) if match else None


def split_sentences(text: str) -> Iterator[tuple[str, ...]]:
    """The words of the text, split after each full stop; the words after the last one are a piece too."""
    piece: list[str] = []
    for word in text.split():
        piece.append(word)
        if word == ".":
            yield tuple(piece)
            piece = []
    if piece:
        yield tuple(piece)


def fluency(text: str) -> float:
    """Fraction of the text's sentences that are well formed and not repetitions; 0 for an empty text.

    Example:
        >>> fluency("the king lost a ring . the king lost a ring . king the .")
        0.3333333333333333
    """
    pieces = list(split_sentences(text))
    good = {piece for piece in pieces if parse(piece) is not None}
    return len(good) / len(pieces) if pieces else 0.0
