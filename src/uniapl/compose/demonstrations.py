"""Instructions that a demonstration follows, after an edit where it does not follow them as it is."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uniapl.compose.edits import EDITS, FRAGILE, stop_words
from uniapl.compose.prompts import with_instructions
from uniapl.compose.wordings import KINDS, Arguments
from uniapl.data.conversations import read_conversation
from uniapl.data.formats import standard_columns
from uniapl.errors import UsageError
from uniapl.rewards.checkers import count_sentences, count_words
from uniapl.rewards.instructions import check_instructions, instructions

LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•+]|\w{1,3}[.)])[ \t]", re.M)
WORD = re.compile(r"(?<![\w'’/.@-])[^\W\d_]{4,20}(?![\w'’/@-]|\.\w)")  # noqa: RUF001
"""A whole word; not a part of a contraction, a hyphenated word or an address."""


def demonstration_of(number: int, row: Mapping[str, Any]) -> str | dict[str, Any] | None:
    """The row's demonstration: text, or an assistant message; None if there is none, or it cannot be edited.

    Edits would apply to thoughts and miss the arguments of tool calls, so that such answers are not used.

    Raises:
        UsageError: The columns contradict each other.
    """
    known = {name: value for name, value in row.items() if value is not None}
    try:
        completion = read_conversation(standard_columns(known, known)).completion
    except UsageError as error:
        raise UsageError(f"row {number}: {error}") from error
    text = completion["content"] if isinstance(completion, dict) else completion
    called = isinstance(completion, dict) and "tool_calls" in completion
    return None if called or not text or not text.strip() or "think>" in text else completion


def compose_demonstration(
    base: str,
    demonstration: str | dict[str, Any],
    rng: random.Random,
    kinds: Sequence[str],
    max_instructions: int,
    forbidden: Mapping[str, set[str]],
) -> dict[str, Any] | None:
    """A prompt with 1 to `max_instructions` instructions, and the demonstration edited to follow all of them.

    Returns:
        The columns of :func:`uniapl.compose.prompts.compose_prompt`, and `completion`: text, or a list
        with one message. None if the demonstration can follow none of the kinds.
    """
    is_text = isinstance(demonstration, str)
    answer = demonstration if is_text else str(demonstration["content"])
    wanted = rng.randint(1, max_instructions)
    text, arguments = answer, {}
    for kind in rng.sample(list(kinds), len(kinds)):
        if len(arguments) < wanted and not any(kind in forbidden[other] for other in arguments):
            found = _following([*arguments, kind], base, answer, rng)
            text, arguments = found or (text, arguments)
    if not arguments:
        return None
    completion = text if is_text else [{**demonstration, "content": text}]
    return with_instructions(base, arguments, rng) | {"completion": completion}


def _following(
    kinds: Sequence[str], base: str, answer: str, rng: random.Random
) -> tuple[str, dict[str, Arguments]] | None:
    """The edited answer and the arguments of each kind; None if it does not follow all of them."""
    arguments = {kind: KINDS[kind].draw(rng, base, set()) for kind in EDITS if kind in kinds}
    before, text, after = answer.partition(answer.strip())
    for kind, given in arguments.items():
        edited = EDITS[kind](text, base, given)
        # Code may get lines around it, and nothing else.
        if FRAGILE.search(answer) and f"\n{text}" not in f"\n{edited}":
            return None
        text = edited
    text = f"{before}{text}{after}"
    for kind, fit in FITS.items():
        if kind in kinds:
            given = fit(text, base, answer, rng)
            if given is None:
                return None
            arguments[kind] = given
    arguments = {kind: arguments[kind] for kind in kinds}
    followed = check_instructions(instructions(base, [*arguments], [*arguments.values()]), text)
    return (text, arguments) if all(followed) else None


def _words(text: str, base: str, answer: str, rng: random.Random) -> Arguments | None:
    count = count_words(text)
    low, high = max(count + 1, math.ceil(1.1 * count)), math.ceil(1.6 * count)
    return {"num_words": rng.randint(low, max(low, high)), "relation": "less than"} if count else None


def _sentences(text: str, base: str, answer: str, rng: random.Random) -> Arguments | None:
    # The checker and a reader count the same sentences only in prose.
    lines = [line for line in answer.splitlines() if line.strip()]
    if LIST_ITEM.search(answer) or not all(re.search(r"[.!?][\"'”’)]*\s*$", line) for line in lines):  # noqa: RUF001
        return None
    count = count_sentences(text)
    if count < 2 or rng.random() < 0.5:
        return {"num_sentences": count + rng.randint(1, 2), "relation": "less than"}
    return {"num_sentences": count, "relation": "at least"}


def _keywords(text: str, base: str, answer: str, rng: random.Random) -> Arguments | None:
    """One or two content words of the answer, preferably long ones that the prompt does not contain."""
    in_answer = {word.lower() for word in WORD.findall(answer)}
    ranks: dict[str, int] = {}
    for word in WORD.findall(text):
        lower = word.lower()
        has_case = all(
            letter.lower() != letter.upper() for letter in word
        )  # scripts without spaces have none
        if has_case and lower in in_answer and lower not in stop_words():
            # A capital at the start of a sentence is not a part of the word.
            is_own_form = word == lower or re.search(rf"[\w,;] {word}\b", text) is not None
            ranks[word] = 2 * (lower not in base.lower()) + (len(word) > 5) + is_own_form
    best = [word for word, rank in ranks.items() if rank == max(ranks.values())]
    by_word = {word.lower(): word for word in sorted(best)}  # lower case replaces capitals
    count = min(len(by_word), rng.randint(1, 2))
    return {"keywords": rng.sample(list(by_word.values()), count)} if best else None


Fit = Callable[[str, str, str, random.Random], Arguments | None]
"""(final text, base prompt, answer before the edits, generator) -> arguments that the final text follows."""
FITS: dict[str, Fit] = {
    "length_constraints:number_words": _words,
    "length_constraints:number_sentences": _sentences,
    "keywords:existence": _keywords,
}
SUPPORTED = (*EDITS, *FITS)
"""The kinds of instructions that demonstrations can be made to follow."""
