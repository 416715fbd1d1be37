"""A small language: its words, its one sentence pattern, and a parser for well-formed sentences.

    the [ADJECTIVE] NOUN VERB (the | a) [ADJECTIVE] OBJECT [PREPOSITION the PLACE] [ADVERB] .

Texts are sequences of words separated by spaces; the full stop is a word of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NOUNS = tuple(
    "farmer teacher doctor sailor painter baker singer soldier hunter judge king queen "
    "child monk pilot clerk nurse poet guard miner butcher gardener fisher tailor".split()
)
VERBS = tuple(
    "saw found took lost kept sold made bought carried cleaned dropped followed "
    "forgot held hid opened painted pushed raised showed stole threw watched wanted".split()
)
OBJECTS = tuple(
    "apple basket boat book bottle box candle chair clock coat coin cup "
    "door drum flag hat key knife lamp letter map ring rope wheel".split()
)
PLACES = tuple("barn bridge castle church forest garden harbor hill market mill river tower".split())
PREPOSITIONS = ("in", "near", "behind", "beside")
ADJECTIVES = tuple(
    "old young dark bright quiet loud small large heavy light clever foolish "
    "brave gentle proud tired empty broken golden wooden".split()
)
ADVERBS = tuple("slowly quickly softly again often rarely proudly sadly gladly calmly today early".split())
DETERMINERS = ("the", "a")

CLASSES = {
    "noun": NOUNS,
    "verb": VERBS,
    "object": OBJECTS,
    "place": PLACES,
    "adjective": ADJECTIVES,
    "adverb": ADVERBS,
}
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One well-formed sentence, by its slots.

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
        """The sentence as it is written, the full stop included."""
        slots = ("the", self.noun_adjective, self.noun, self.verb)
        slots += (self.determiner, self.object_adjective, self.object)
        slots += (self.preposition, "the", self.place) if self.place else ()
        return tuple(word for word in (*slots, self.adverb, ".") if word is not None)


def parse(words: Sequence[str]) -> Sentence | None:
    """The sentence that these words are, full stop included; None if they are not well formed.

    Example:
        >>> parse("the king lost a golden ring .".split()).object_adjective
        'golden'
    """
    rest = list(words)

    def take(kind: Sequence[str]) -> str | None:
        return rest.pop(0) if rest and rest[0] in kind else None

    article, noun_adjective = take(("the",)), take(ADJECTIVES)
    noun, verb, determiner = take(NOUNS), take(VERBS), take(DETERMINERS)
    object_adjective, object_ = take(ADJECTIVES), take(OBJECTS)
    preposition = take(PREPOSITIONS)
    place_article = take(("the",)) if preposition else None
    place = take(PLACES) if place_article else None
    adverb, stop = take(ADVERBS), take((".",))
    if not (article and noun and verb and determiner and object_ and stop) or rest:
        return None
    if preposition and not place:
        return None
    return Sentence(
        noun=noun,
        verb=verb,
        object=object_,
        determiner=determiner,
        noun_adjective=noun_adjective,
        object_adjective=object_adjective,
        preposition=preposition,
        place=place,
        adverb=adverb,
    )


def split_sentences(text: str) -> Iterator[tuple[str, ...]]:
    """The text cut behind each full stop; what follows the last one is a piece too."""
    piece: list[str] = []
    for word in text.split():
        piece.append(word)
        if word == ".":
            yield tuple(piece)
            piece = []
    if piece:
        yield tuple(piece)


def fluency(text: str) -> float:
    """Share of the text's sentences that are well formed and not said before; 0 for an empty text.

    Example:
        >>> fluency("the king lost a ring . the king lost a ring . king the .")
        0.3333333333333333
    """
    pieces = list(split_sentences(text))
    good = {piece for piece in pieces if parse(piece) is not None}
    return len(good) / len(pieces) if pieces else 0.0
