"""Which prompts of one set stand in another: whole, or with thirteen words in a row.

The width of 13 is GPT-3's (arXiv 2005.14165, appendix C), which most reports on contamination have kept.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 13
WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What of some texts stands in others, by position.

    Example:
        Overlap(exact={0: 4}, ngram={0: 4, 2: 7}): our text 0 is their text 4; our text 2 has thirteen words
        in a row of their text 7. What is exact is an n-gram too, however short.
    """

    exact: dict[int, int]
    ngram: dict[int, int]


def overlap(ours: Sequence[str], theirs: Sequence[str], *, width: int = WIDTH) -> Overlap:
    """Our texts that stand in theirs; case, punctuation and white space do not count."""
    whole: dict[tuple[str, ...], int] = {}
    grams: dict[int, int] = {}
    for place, text in enumerate(theirs):
        words = _words(text)
        if words:
            whole.setdefault(words, place)
        for gram in _grams(words, width):
            grams.setdefault(gram, place)
    exact: dict[int, int] = {}
    ngram: dict[int, int] = {}
    for place, text in enumerate(ours):
        words = _words(text)
        if words in whole:
            exact[place] = ngram[place] = whole[words]
            continue
        hit = next((grams[gram] for gram in _grams(words, width) if gram in grams), None)
        if hit is not None:
            ngram[place] = hit
    return Overlap(exact=exact, ngram=ngram)


def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def _grams(words: tuple[str, ...], width: int) -> list[int]:
    """Hashes of all runs of `width` words: the words themselves would take many times the memory."""
    return [hash(words[i : i + width]) for i in range(len(words) - width + 1)]
