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
    "including|like|such|especially|particularly"
)
"""Words with which an item of a series does not begin."""
SERIES = re.compile(
    rf"((?:, (?!(?:{NO_ITEM})\b)[^\s,.;:!?]+(?: (?!and |or )[^\s,.;:!?]+){{0,2}})+), (and|or)(?= )", re.I
)
"""The middle of "apples, pears, and plums", with items of at most three words."""
ASIDE = re.compile(r"\([^()\n]*\)")
THOUSANDS = re.compile(r"(?<![\d,])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])")
GAP = re.compile(rf"[ \t]*(?:[{COMMAS}][ \t]*)+")
OWN_TITLE = re.compile(r"\A(?:#{1,6}[ \t]+|[*]*title[*]*:[*]*[ \t]*)([^\n]+)\n+(?=\S)", re.I)
"""A title that the answer already has: "Title: ..." or a Markdown heading."""
REQUEST = re.compile(
    r"(?:(?:hi|hello|hey|please|kindly)\b[,!]? |(?:can|could|would|will) you |"
    r"i(?: want|'d like| need) you to |"
    r"(?:write|give|tell|show|help|explain|describe|create|make|provide|suggest|generate|compose|draft) |"
    r"(?:develop|design) |(?:to )?(?:me|us) |(?-i:a|an|the|some|about) |(?:lists?|names?|examples?) of |"
    r"what(?:'s| is| are| was| were) (?=(?:the|some|an?) ))*",
    re.I,
)
"""How requests begin; the subject follows."""
POINTER = re.compile(r"\b(?:given|following|below|provided|consider this|title|headline)\b", re.I)
"""Words of a sentence whose subject is only named in the text after it."""
SENTENCE_END = re.compile(r"(?<=[.!?:;])(?<! [A-Z]\.)\s|\n")
TITLE_WORDS = 12
CLAUSES = """
    that which who whose because so if when while by using including where after before without as given since
""".split()
PREPOSITIONS = "for in on at with from about during between into to through under over against".split()
"""Where a long title is cut."""


@functools.cache
def stop_words() -> frozenset[str]:
    """English words without a subject of their own, such as "the" and "which"."""
    # lm-eval, whose checkers are needed here too, depends on scikit-learn.
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


def with_title(text: str, base: str, arguments: Arguments) -> str:
    """The text below a line with a title: its own one, or one from the prompt's or its first words.

    Example:
        >>> with_title("The Nile.", "Please name a river in Africa.", {})
        '<<Name a river in Africa>>\\n\\nThe Nile.'
    """
    own = OWN_TITLE.match(text)
    title = _plain(own[1]) if own else _headline(base) or _headline(text)
    if not title:
        return text
    return f"<<{title}>>\n\n{text[own.end() :] if own else text}"


def _headline(text: str) -> str:
    """A title of at most TITLE_WORDS words from the first sentence; "" if it has no content word."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    # "Suggest names for this shop.\n\nThe Corner Bakery": a short last paragraph is the subject.
    is_subject = (
        len(paragraphs) > 1 and "\n" not in paragraphs[-1] and len(paragraphs[-1].split()) < TITLE_WORDS
    )
    sentences = SENTENCE_END.split(paragraphs[-1] if is_subject else text.strip())
    sentence = next(
        (one for one in sentences if len(one.split()) > 1 and not POINTER.search(one)), sentences[0]
    )
    if len(sentence.split()) > TITLE_WORDS and sentence.split()[0].lower() in (*CLAUSES, *PREPOSITIONS):
        sentence = sentence.rpartition(", ")[2]  # "If a train is late, when ...?"
    subject = REQUEST.sub("", re.sub(r",? please\b\W*$", "", sentence), count=1)
    sentence = subject if len(subject.split()) > 1 else sentence
    words = _plain(sentence).split()
    if len(words) > TITLE_WORDS:
        words = _plain(" ".join(words[: _cut(words)])).split()
    if all(word.lower() in stop_words() or not re.search(r"\w", word) for word in words):
        return ""
    title = " ".join(words)[:80].strip()
    return title[:1].upper() + title[1:]


def _cut(words: list[str]) -> int:
    """Where to end a title: before a clause, else before a preposition, else before "and"."""
    lower = [word.lower() for word in words]
    places = range(4, min(len(words), TITLE_WORDS + 1))
    clauses = [place for place in places if lower[place] in CLAUSES][:1]
    prepositions = [place for place in places if lower[place] in PREPOSITIONS]
    conjunctions = [place for place in places if lower[place] in ("and", "or")]
    end = [TITLE_WORDS, *conjunctions, *prepositions, *clauses][-1]
    while end > 1 and lower[end - 1] in stop_words():
        end -= 1
    return end


def _plain(text: str) -> str:
    """The text without marks that a title does not have."""
    return re.sub(r"[\"“”<>*_#`]", "", text).strip().rstrip(".,:;!? ")


def with_ending(text: str, base: str, arguments: Arguments) -> str:
    """The text with the closing phrase after it: on the same line if it is one line of sentences."""
    phrase = str(arguments["end_phrase"])
    if text.endswith(phrase):
        return text
    is_prose = "\n" not in text and re.search(r"[.!?][\"'”’)]?$", text)  # noqa: RUF001
    return text + (" " if is_prose else "\n\n") + phrase


def without_commas(text: str, base: str, arguments: Arguments) -> str:
    """The text without commas, with "and" or "or" between the items of a series, and ";" inside parentheses.

    Examples:
        >>> without_commas("Well, 1,000 cats.", "", {})
        'Well 1000 cats.'
        >>> without_commas("I like apples, pears, and plums.", "", {})
        'I like apples and pears and plums.'
    """
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = SERIES.sub(lambda match: f"{match[1].replace(',', f' {match[2]}')} {match[2]}", text)
    text = ASIDE.sub(lambda match: re.sub(r"(?<!\.),(?= )", ";", match[0]), text)

    def gap(match: re.Match[str]) -> str:
        start, end = match.span()
        at_edge = text[start - 1 : start] in ("", "\n") or text[end : end + 1] in ("", "\n")
        touches = match[0][-1] in COMMAS and text[end : end + 1] in CLOSING
        return "" if at_edge or touches else " "

    return GAP.sub(gap, text)


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
