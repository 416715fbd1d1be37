"""Overlap between two sets of prompts: equal texts, or thirteen words in a row in common.

The width of 13 is GPT-3's (arXiv 2005.14165, appendix C) and the one that most contamination reports use.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 13
WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Index of one of our texts -> index of a text of theirs that it overlaps with.

    Example:
        Overlap(exact={0: 4}, ngram={0: 4, 2: 7}): our text 0 equals their text 4, and our text 2 has thirteen
        words in a row in common with their text 7. An exact match of any length is an n-gram match too.
    """

    exact: dict[int, int]
    ngram: dict[int, int]


def overlap(ours: Sequence[str], theirs: Sequence[str], *, width: int = WIDTH) -> Overlap:
    """Find our texts that occur in theirs, ignoring case, punctuation and white space."""
    texts: dict[tuple[str, ...], int] = {}
    grams: dict[int, int] = {}
    for index, text in enumerate(theirs):
        if words := _words(text):
            texts.setdefault(words, index)
        for gram in _grams(words, width):
            grams.setdefault(gram, index)
    exact: dict[int, int] = {}
    ngram: dict[int, int] = {}
    for index, text in enumerate(ours):
        words = _words(text)
        if words in texts:
            exact[index] = ngram[index] = texts[words]
        elif hits := [grams[gram] for gram in _grams(words, width) if gram in grams]:
            ngram[index] = hits[0]
    return Overlap(exact=exact, ngram=ngram)


def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def _grams(words: tuple[str, ...], width: int) -> list[int]:
    """Hashes of all runs of `width` words, which need a fraction of the memory of the words."""
    return [hash(words[i : i + width]) for i in range(len(words) - width + 1)]
