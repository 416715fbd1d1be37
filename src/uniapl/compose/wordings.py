"""IFEval's 25 kinds of instructions in words of our own: arguments to draw, and several ways to say each.

Their meaning is that of lm-eval's checkers (arXiv 2311.07911). The sentences are ours, so that prompts made
with them do not repeat the benchmark's.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOUNS = """
    bridge harbour lantern orchard compass garden window letter mountain river island market engine
    kitchen blanket carpet feather glacier hammer insect kettle ladder meadow needle ocean pencil
    ribbon saddle thunder umbrella valley whistle anchor barrel candle desert forest guitar lemon
    mirror notebook oven pillow rocket shelter tunnel velvet wagon copper magnet silver temple
""".split()
RARE = "jqxz"
"""Letters that none of these words has, so that they can be avoided beside them."""
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
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How one kind of instruction is drawn and said.

    Example:
        Kind(draw=lambda rng, base, taken: {"num_bullets": 3}, wordings=("Give {num_bullets} bullets.",))
    """

    draw: Callable[[random.Random, str, set[str]], Arguments]
    """(generator, base prompt, words that other instructions use) -> the arguments."""
    wordings: Sequence[str]
    """Formats of the arguments and of what :func:`say` adds to them."""


def say(kind: Kind, arguments: Mapping[str, Any], rng: random.Random) -> str:
    """One of the kind's wordings with the arguments in it."""
    words: dict[str, Any] = dict(arguments)
    for name in ("keywords", "forbidden_words"):
        if name in words:
            words[name] = ", ".join(f'"{word}"' for word in words[name])
    for name in ("relation", "let_relation", "capital_relation"):
        if name in words:
            choices = {"at least": ["at least", "no fewer than"], "less than": ["less than", "fewer than"]}
            words[name] = rng.choice(choices[words[name]])
    if "language" in words:
        words["language"] = LANGUAGES[words["language"]]
    return rng.choice(kind.wordings).format(**words)


def _nothing(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    return {}


def _number(name: str, low: int, high: int) -> Callable[[random.Random, str, set[str]], Arguments]:
    return lambda rng, base, taken: {name: rng.randint(low, high)}


def _related(
    number: str, relation: str, at_least: tuple[int, int], less_than: tuple[int, int]
) -> Callable[[random.Random, str, set[str]], Arguments]:
    def draw(rng: random.Random, base: str, taken: set[str]) -> Arguments:
        chosen = rng.choice(["at least", "less than"])
        return {number: rng.randint(*(at_least if chosen == "at least" else less_than)), relation: chosen}

    return draw


def _fresh(rng: random.Random, words: Sequence[str], taken: set[str], count: int) -> list[str]:
    """Words that no other instruction of the prompt uses; they are taken from now on."""
    drawn = rng.sample([word for word in words if word not in taken], count)
    taken.update(drawn)
    return drawn


def _letter(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    # Few of a rare letter can be avoided, and many of a common one can be had, in a text of any length.
    if rng.random() < 0.5:
        return {"letter": rng.choice(RARE), "let_frequency": rng.randint(2, 4), "let_relation": "less than"}
    return {"letter": rng.choice("aeinorst"), "let_frequency": rng.randint(5, 15), "let_relation": "at least"}


def _paragraph(rng: random.Random, base: str, taken: set[str]) -> Arguments:
    count = rng.randint(2, 4)
    (word,) = _fresh(rng, NOUNS, taken, 1)
    return {"num_paragraphs": count, "nth_paragraph": rng.randint(1, count), "first_word": word}


KINDS: dict[str, Kind] = {
    "keywords:existence": Kind(
        lambda rng, base, taken: {"keywords": _fresh(rng, NOUNS, taken, rng.randint(1, 3))},
        (
            "Work in these words: {keywords}.",
            "Use each of {keywords} somewhere.",
            "{keywords} must occur in your text.",
        ),
    ),
    "keywords:frequency": Kind(
        lambda rng, base, taken: {
            "keyword": _fresh(rng, NOUNS, taken, 1)[0],
            "frequency": rng.randint(2, 4),
            "relation": rng.choice(["at least", "less than"]),
        },
        (
            'Let the word "{keyword}" come up {relation} {frequency} times.',
            'Write "{keyword}" {relation} {frequency} times in all.',
            'The word "{keyword}" is to be found {relation} {frequency} times in what you write.',
        ),
    ),
    "keywords:forbidden_words": Kind(
        lambda rng, base, taken: {"forbidden_words": _fresh(rng, COMMON, taken, rng.randint(1, 4))},
        (
            "Do without {forbidden_words}.",
            "Avoid these words: {forbidden_words}.",
            "Leave out {forbidden_words}.",
        ),
    ),
    "keywords:letter_frequency": Kind(
        _letter,
        (
            "The letter {letter} should turn up {let_relation} {let_frequency} times.",
            "Use the letter {letter} {let_relation} {let_frequency} times.",
            "Counted over the whole text, write {let_relation} {let_frequency} times the letter {letter}.",
        ),
    ),
    "language:response_language": Kind(
        lambda rng, base, taken: {"language": rng.choice(sorted(LANGUAGES))},
        (
            "Answer in {language} only.",
            "Everything you write must be {language}.",
            "Reply entirely in {language}.",
        ),
    ),
    "length_constraints:number_sentences": Kind(
        _related("num_sentences", "relation", (3, 8), (4, 9)),
        ("Write {relation} {num_sentences} sentences.", "Use {relation} {num_sentences} sentences for it."),
    ),
    "length_constraints:number_paragraphs": Kind(
        _number("num_paragraphs", 2, 5),
        (
            "Split it into {num_paragraphs} paragraphs, with a line of three asterisks (***) between them.",
            "Give me exactly {num_paragraphs} paragraphs and divide them by ***.",
        ),
    ),
    "length_constraints:number_words": Kind(
        _related("num_words", "relation", (30, 150), (40, 200)),
        (
            "Keep it to {relation} {num_words} words.",
            "Your text needs {relation} {num_words} words.",
            "Length: {relation} {num_words} words.",
        ),
    ),
    "length_constraints:nth_paragraph_first_word": Kind(
        _paragraph,
        (
            "Write {num_paragraphs} paragraphs with a blank line between them; number {nth_paragraph} opens "
            'with "{first_word}".',
            "Make it {num_paragraphs} paragraphs, parted by two line breaks, and start paragraph "
            '{nth_paragraph} with the word "{first_word}".',
        ),
    ),
    "detectable_content:number_placeholders": Kind(
        _number("num_placeholders", 1, 4),
        (
            "Leave at least {num_placeholders} blanks to fill in, in square brackets like [date].",
            "Put in {num_placeholders} or more placeholders of the form [name].",
        ),
    ),
    "detectable_content:postscript": Kind(
        lambda rng, base, taken: {"postscript_marker": rng.choice(["P.S.", "P.P.S"])},
        (
            "Close with a postscript marked {postscript_marker}",
            "Add a remark after the text that begins with {postscript_marker}",
        ),
    ),
    "detectable_format:number_bullet_lists": Kind(
        _number("num_bullets", 2, 6),
        (
            "Include a list of exactly {num_bullets} bullets, each on a line that starts with an asterisk.",
            "Use {num_bullets} markdown bullets (* like this), no more and no fewer.",
        ),
    ),
    "detectable_format:constrained_response": Kind(
        _nothing,
        (
            'Say only one of these: "My answer is maybe.", "My answer is yes.", "My answer is no."',
            'Reply with "My answer is no." or "My answer is maybe." or "My answer is yes.", and no more.',
        ),
    ),
    "detectable_format:number_highlighted_sections": Kind(
        _number("num_highlights", 1, 4),
        (
            "Set off at least {num_highlights} passages with asterisks, *like this*.",
            "Mark {num_highlights} or more phrases in markdown italics (*phrase*).",
        ),
    ),
    "detectable_format:multiple_sections": Kind(
        lambda rng, base, taken: {
            "section_spliter": rng.choice(["Section", "PART", "Chapter"]),
            "num_sections": rng.randint(2, 4),
        },
        (
            "Make {num_sections} sections of it, headed {section_spliter} 1, {section_spliter} 2 and so on.",
            "There should be {num_sections} sections; head each with {section_spliter} and its number.",
        ),
    ),
    "detectable_format:json_format": Kind(
        _nothing,
        (
            "Reply with valid JSON and nothing else.",
            "Your whole reply must be one JSON object.",
            "Put everything into JSON.",
        ),
    ),
    "detectable_format:title": Kind(
        _nothing,
        (
            "Give it a title in double angle brackets, <<like this>>.",
            "Put a headline such as <<A headline>> on it.",
        ),
    ),
    "combination:two_responses": Kind(
        _nothing,
        (
            "Write two different answers and put six asterisks (******) between them.",
            "I want two versions that are not the same, divided by ******.",
        ),
    ),
    "combination:repeat_prompt": Kind(
        lambda rng, base, taken: {"prompt_to_repeat": base},
        (
            "First copy my request above word for word, then answer it. This sentence and what follows are "
            "not part of it.",
            "Before you answer, repeat what I asked above without a change (but not this instruction).",
        ),
    ),
    "startend:end_checker": Kind(
        lambda rng, base, taken: {"end_phrase": rng.choice(ENDINGS)},
        ('The last words must be: "{end_phrase}"', 'Finish with exactly this: "{end_phrase}"'),
    ),
    "change_case:capital_word_frequency": Kind(
        _related("capital_frequency", "capital_relation", (1, 4), (2, 6)),
        (
            "Write {capital_relation} {capital_frequency} words all in capitals.",
            "Words in ALL CAPS: {capital_relation} {capital_frequency}.",
        ),
    ),
    "change_case:english_capital": Kind(
        _nothing, ("WRITE ENGLISH, IN CAPITALS ONLY.", "Use English and capital letters throughout.")
    ),
    "change_case:english_lowercase": Kind(
        _nothing,
        ("Write English without a single capital letter.", "Only small letters, please, and in English."),
    ),
    "punctuation:no_comma": Kind(
        _nothing, ("Do not use commas.", "No commas at all, please.", "Get by without any comma.")
    ),
    "startend:quotation": Kind(
        _nothing,
        (
            "Put the whole reply between double quotation marks.",
            'Begin and end with a double quotation mark (").',
        ),
    ),
}

CASES = ("change_case:english_capital", "change_case:english_lowercase")
FURTHER_CONFLICTS: dict[str, set[str]] = {
    # lm-eval's table lets these stand together, but a section's head is read with its case, and PART counts
    # among the words in capitals.
    "detectable_format:multiple_sections": {*CASES, "change_case:capital_word_frequency"},
    # The base prompt may hold commas.
    "combination:repeat_prompt": {"punctuation:no_comma"},
    # The checkers would let these pass, but in words they contradict each other: what comes last?
    "startend:end_checker": {"startend:quotation", "detectable_content:postscript"},
    # The word is an English one; and letters that are rare in English are not in German or Polish.
    "language:response_language": {
        "length_constraints:nth_paragraph_first_word",
        "keywords:letter_frequency",
    },
}
