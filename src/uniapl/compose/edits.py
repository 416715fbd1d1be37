"""Edits that make an answer follow an instruction: a title, no commas, lower case, and so on."""

import functools
import re
from collections.abc import Callable

from uniapl.compose.wordings import Arguments

COMMAS = ",\uff0c\u060c\u3001"
"""The Latin, fullwidth, Arabic and ideographic comma; the checker finds only the first, a reader all."""
CLOSING = ".;:!?)]}\"'”’"  # noqa: RUF001
NO_ITEM = (
    "he|she|it|they|we|you|i|this|that|these|those|there|which|who|where|when|but|so|if|as|in|for|with|by|"
    "including|like|such|especially|particularly|and|or"
)
"""Words with which an item of a series does not begin."""
SERIES = re.compile(
    rf"((?:, (?!(?:{NO_ITEM})\b)[^\s,.;:!?()]+(?: (?!and |or )[^\s,.;:!?()]+){{0,2}})+)(?:, (and|or)(?= ))?",
    re.I,
)
"""The middle of "apples, pears, and plums", with items of at most three words; without "and", no series."""
ASIDE = re.compile(r"\([^()\n]*\)")
THOUSANDS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])")
FRAGILE = re.compile(r"[`{}\\|=@_]|://|\bwww\.|</?\w|\w\(")
"""Signs of code, formulas, tables, markup and addresses, which a change of single characters would break."""
GAP = re.compile(rf"[ \t]*(?:[{COMMAS}][ \t]*)+")
OWN_TITLE = re.compile(r"\A(?:#{1,6}[ \t]+|[*]*title[*]*:[*]*[ \t]*)([^\n]+)\n+(?=\S)", re.I)
"""A title that the answer already has: "Title: ..." or a Markdown heading."""
MARKS = re.compile(r"[\"“”<>*_#`\[\]]|^\W*\d+[.)]\s")
"""Marks that a title does not have, and the number of a list's item."""
CLAUSE_END = re.compile(r"[,.:;!?()…—]+(?:\s|$)|\s[(–—-]\s?|\n")  # noqa: RUF001
TITLE_WORDS = 7


@functools.cache
def stop_words() -> frozenset[str]:
    """English words without a subject of their own, such as "the" and "which", and "please" and "sure"."""
    # lm-eval, whose checkers are needed here too, depends on scikit-learn.
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    nouns = {"bill", "fire", "interest", "mill", "system"}
    return ENGLISH_STOP_WORDS - nouns | {"please", "sure"}


def with_title(text: str, base: str, arguments: Arguments) -> str:
    """The text below a line with a title: its own one, or the first words of the text, or else of the prompt.

    Examples:
        >>> with_title("The Nile is the longest river. It is in Africa.", "Name a river.", {})
        '<<Nile is the longest river>>\\n\\nThe Nile is the longest river. It is in Africa.'
        >>> with_title("Yes.", "Please name a river in Africa.", {})
        '<<River in Africa>>\\n\\nYes.'
    """
    if re.match(r"<<[^\n]*\w[^\n]*>>", text):
        return text
    if own := OWN_TITLE.match(text):
        return f"<<{MARKS.sub('', own[1]).strip()}>>\n\n{text[own.end() :]}"
    is_code = FRAGILE.search(text.partition("\n")[0])
    title = ("" if is_code else _headline(text, 2)) or _headline(base, 1)
    return f"<<{title}>>\n\n{text}" if title else text


def _headline(text: str, least: int) -> str:
    """At most TITLE_WORDS words of the first clause that has `least`, without stop words at the ends."""

    def is_stop_word(word: str) -> bool:
        start = re.split(r"['’]", word.lower())[0]  # noqa: RUF001
        return start in stop_words() or re.search(r"\w", word) is None

    for clause in CLAUSE_END.split(text):
        words = MARKS.sub("", clause).split()
        while words and is_stop_word(words[0]):
            del words[0]
        del words[TITLE_WORDS:]
        while words and is_stop_word(words[-1]):
            del words[-1]
        if len(words) >= least:
            title = " ".join(words)[:80].strip("() ")
            return title[:1].upper() + title[1:]
    return ""


def with_ending(text: str, base: str, arguments: Arguments) -> str:
    """The text with the closing phrase after it: on the same line if it is one line of sentences."""
    phrase = str(arguments["end_phrase"])
    if text.endswith(phrase):
        return text
    is_prose = "\n" not in text and re.search(r"[.!?][\"'”’)]?$", text)  # noqa: RUF001
    return text + (" " if is_prose else "\n\n") + phrase


def without_commas(text: str, base: str, arguments: Arguments) -> str:
    """The text without commas, with "and" or "or" between the items of a series, and ";" inside parentheses.

    Text with a decimal comma is returned as it is, because no other mark keeps the number.

    Examples:
        >>> without_commas("Well, 1,000 cats.", "", {})
        'Well 1000 cats.'
        >>> without_commas("I like apples, pears, and plums.", "", {})
        'I like apples and pears and plums.'
    """
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if re.search(rf"\d[{COMMAS}]\d", text):
        return text  # 3,5 is a number in many languages
    text = SERIES.sub(_series, text)
    text = ASIDE.sub(lambda match: re.sub(r"(?<!\.),(?= )", ";", match[0]), text)

    def gap(match: re.Match[str]) -> str:
        start, end = match.span()
        at_edge = text[start - 1 : start] in ("", "\n") or text[end : end + 1] in ("", "\n")
        touches = match[0][-1] in COMMAS and text[end : end + 1] in CLOSING
        return "" if at_edge or touches else " "

    return GAP.sub(gap, text)


def _series(match: re.Match[str]) -> str:
    # A series without an end is matched too, because a search from each of its commas takes quadratic time.
    items, joiner = match.groups()
    return f"{items.replace(',', f' {joiner}')} {joiner}" if joiner else items


def lower_case(text: str, base: str, arguments: Arguments) -> str:
    """The text in lower case."""
    return text.lower()


def quoted(text: str, base: str, arguments: Arguments) -> str:
    """The text between double quotation marks; those inside it become single ones."""
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        return text
    return '"' + text.replace('"', "'") + '"'


Edit = Callable[[str, str, Arguments], str]
"""(text, base prompt, the instruction's arguments) -> the text that follows it, if that is possible."""
EDITS: dict[str, Edit] = {
    "startend:end_checker": with_ending,
    "detectable_format:title": with_title,
    "punctuation:no_comma": without_commas,
    "change_case:english_lowercase": lower_case,
    "startend:quotation": quoted,
}
"""In the order in which they are applied: titles and closing phrases may have commas and capitals."""
