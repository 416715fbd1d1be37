"""IFEval's 25 kinds of instructions: arguments to draw, and our own wordings to ask for them.

Their meaning is that of lm-eval's checkers (arXiv 2311.07911). The wordings are ours, so that composed
prompts do not repeat the benchmark's.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

NOUNS = """
    bridge harbour lantern orchard compass garden window letter mountain river island market engine
    kitchen blanket carpet feather glacier hammer insect kettle ladder meadow needle ocean pencil
    ribbon saddle thunder umbrella valley whistle anchor barrel candle desert forest guitar lemon
    mirror notebook oven pillow rocket shelter tunnel velvet wagon copper magnet silver temple
""".split()
RARE = "jqxz"
"""Letters that none of the nouns contains, so that both instructions can be followed."""
COMMON = "very really also just many good great make people thing often always important different".split()
ENDINGS = (
    "That is all for now.",
    "I hope this helps a little.",
    "Please ask if anything is unclear.",
    "There is nothing more to add.",
    "Thank you for reading this far.",
)
LANGUAGES = {
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "pl": "Polish",
}
RELATIONS = {"at least": ["at least", "no fewer than"], "less than": ["less than", "fewer than"]}
Arguments = dict[str, Any]
Draw = Callable[[random.Random, str, set[str]], Arguments]
"""(generator, base prompt, words in other instructions) -> arguments."""


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Example:
        Kind(draw=lambda rng, base, taken: {"num_bullets": 3}, wordings=("Give {num_bullets} bullets.",))
    """

    draw: Draw
    wordings: Sequence[str]
    """Formats of the arguments, as :func:`say` prepares them."""


def say(kind: Kind, arguments: Mapping[str, Any], rng: random.Random) -> str:
    """One of the wordings with the arguments filled in."""
    words: dict[str, Any] = dict(arguments)
    for name in ("keywords", "forbidden_words"):
        if name in words:
            words[name] = ", ".join(f'"{word}"' for word in words[name])
    for name in ("relation", "let_relation", "capital_relation"):
        if name in words:
            words[name] = rng.choice(RELATIONS[words[name]])
    if "language" in words:
        words["language"] = LANGUAGES[words["language"]]
    return rng.choice(kind.wordings).format(**words)


def _number(name: str, low: int, high: int) -> Draw:
    return lambda rng, base, taken: {name: rng.randint(low, high)}


def _choice(name: str, values: Sequence[str]) -> Draw:
    return lambda rng, base, taken: {name: rng.choice(values)}


def _related(number: str, relation: str, at_least: tuple[int, int], less_than: tuple[int, int]) -> Draw:
    def draw(rng: random.Random, base: str, taken: set[str]) -> Arguments:
        chosen = rng.choice(list(RELATIONS))
        return {number: rng.randint(*(at_least if chosen == "at least" else less_than)), relation: chosen}

    return draw


def _fresh(rng: random.Random, words: Sequence[str], taken: set[str], count: int) -> list[str]:
    """Words that no other instruction of the prompt uses; they are added to `taken`."""
    drawn = rng.sample([word for word in words if word not in taken], count)
    taken.update(drawn)
    return drawn


def _frequency(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    word = _fresh(rng, NOUNS, taken, 1)[0]
    return {"keyword": word, "frequency": rng.randint(2, 4), "relation": rng.choice(list(RELATIONS))}


def _letter(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    # A text of any length can avoid a rare letter, and can have many of a common one.
    if rng.random() < 0.5:
        return {"letter": rng.choice(RARE), "let_frequency": rng.randint(2, 4), "let_relation": "less than"}
    return {"letter": rng.choice("aeinorst"), "let_frequency": rng.randint(5, 15), "let_relation": "at least"}


def _paragraph(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    count = rng.randint(2, 4)
    (word,) = _fresh(rng, NOUNS, taken, 1)
    return {"num_paragraphs": count, "nth_paragraph": rng.randint(1, count), "first_word": word}


def _sections(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    return {
        "section_spliter": rng.choice(["Section", "PART", "Chapter"]),
        "num_sections": rng.randint(2, 4),
    }


DRAWS: dict[str, Draw] = {
    "keywords:existence": lambda rng, base, taken: {"keywords": _fresh(rng, NOUNS, taken, rng.randint(1, 3))},
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": lambda rng, base, taken: {
        "forbidden_words": _fresh(rng, COMMON, taken, rng.randint(1, 4))
    },
    "keywords:letter_frequency": _letter,
    "language:response_language": _choice("language", sorted(LANGUAGES)),
    "length_constraints:number_sentences": _related("num_sentences", "relation", (3, 8), (4, 9)),
    "length_constraints:number_paragraphs": _number("num_paragraphs", 2, 5),
    "length_constraints:number_words": _related("num_words", "relation", (30, 150), (40, 200)),
    "length_constraints:nth_paragraph_first_word": _paragraph,
    "detectable_content:number_placeholders": _number("num_placeholders", 1, 4),
    "detectable_content:postscript": _choice("postscript_marker", ["P.S.", "P.P.S"]),
    "detectable_format:number_bullet_lists": _number("num_bullets", 2, 6),
    "detectable_format:number_highlighted_sections": _number("num_highlights", 1, 4),
    "detectable_format:multiple_sections": _sections,
    "combination:repeat_prompt": lambda rng, base, taken: {"prompt_to_repeat": base},
    "startend:end_checker": _choice("end_phrase", ENDINGS),
    "change_case:capital_word_frequency": _related("capital_frequency", "capital_relation", (1, 4), (2, 6)),
}
"""The kinds that have arguments."""

KINDS: dict[str, Kind] = {
    name: Kind(DRAWS.get(name, lambda rng, base, taken: {}), wordings)
    for name, wordings in yaml.safe_load(
        (files("uniapl.compose") / "wordings.yaml").read_text(encoding="utf-8")
    ).items()
}

CASES = ("change_case:english_capital", "change_case:english_lowercase")
FURTHER_CONFLICTS: dict[str, set[str]] = {
    # Section headings are matched with their case, and PART counts as a word in capitals.
    "detectable_format:multiple_sections": {*CASES, "change_case:capital_word_frequency"},
    # The base prompt may contain commas.
    "combination:repeat_prompt": {"punctuation:no_comma"},
    # The checkers accept these together, but their wordings contradict each other about the end of the text.
    "startend:end_checker": {"startend:quotation", "detectable_content:postscript"},
    # The first word is English, and letters that are rare in English are not rare in German or Polish.
    "language:response_language": {
        "length_constraints:nth_paragraph_first_word",
        "keywords:letter_frequency",
    },
}
