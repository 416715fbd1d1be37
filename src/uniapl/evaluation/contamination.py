"""Overlap between two sets of prompts: equal texts, or thirteen words in a row in common.

The width of 13 is GPT-3's (arXiv 2005.14165, appendix C) and the one that most contamination reports use.
Scripts without spaces between words are counted by characters: a Chinese one is a word, and two letters of a
script with an alphabet or syllabary (kana, Thai, Lao, Khmer, Burmese) are one.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 13
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
LETTERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
"""Thai and Lao, Burmese, Khmer, kana: two of their letters count as one word."""
WORD = re.compile(rf"(?=\w)[{HAN}{LETTERS}]|(?:(?![{HAN}{LETTERS}])\w)+")
LETTER = re.compile(f"[{LETTERS}]")


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
    """Find our texts that occur in theirs, ignoring case, punctuation, white space and full or half width."""
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
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def _grams(words: tuple[str, ...], width: int) -> list[int]:
    """Hashes of all runs of `width` words, which need a fraction of the memory of the words."""
    found: list[int] = []
    end = halves = 0
    for start, word in enumerate(words):
        while halves < 2 * width and end < len(words):
            halves += _half_words(words[end])
            end += 1
        if halves < 2 * width:
            break
        found.append(hash(words[start:end]))
        halves -= _half_words(word)
    return found


def _half_words(word: str) -> int:
    return 1 if LETTER.match(word) else 2
