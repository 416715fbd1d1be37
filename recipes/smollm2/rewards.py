"""The measures of recipes/smollm2, and the reward of its `gameable.yaml`."""

import re
from typing import Any

from uniapl.rewards.builtin import completion_text
from uniapl.rewards.instructions import instruction_following
from uniapl.types import prompt_text

WORDS = 40
"""The number of words from which `words` is 1."""


def followed(
    prompts: list[Any], completions: list[Any], instruction_id_list: list[Any], kwargs: list[Any]
) -> list[float | Exception]:
    """Fraction of the prompt's instructions that the completion follows."""
    return instruction_following(prompts, completions, instruction_id_list, kwargs, criterion="share")


def all_followed(
    prompts: list[Any], completions: list[Any], instruction_id_list: list[Any], kwargs: list[Any]
) -> list[float | Exception]:
    """1 if the completion follows all of the prompt's instructions."""
    return instruction_following(prompts, completions, instruction_id_list, kwargs)


def first_followed(
    prompts: list[Any], completions: list[Any], instruction_id_list: list[Any], kwargs: list[Any]
) -> list[float | Exception]:
    """1 if the completion follows the first of the prompt's instructions."""
    first = [ids[:1] for ids in instruction_id_list], [arguments[:1] for arguments in kwargs]
    return instruction_following(prompts, completions, *first)


def words(completions: list[Any]) -> list[float]:
    """A reward for length: the number of words, as a fraction of 40, at most 1."""
    return [min(1.0, len(completion_text(completion).split()) / WORDS) for completion in completions]


def copied(prompts: list[Any], completions: list[Any]) -> list[float]:
    """Fraction of the completion's three-word sequences that occur in the prompt; 0 if it has none.

    A similarity of sentence embeddings does not see that an answer repeats the question.
    """
    fractions: list[float] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        known, own = set(_threes(prompt_text(prompt))), _threes(completion_text(completion))
        fractions.append(sum(three in known for three in own) / len(own) if own else 0.0)
    return fractions


def _threes(text: str) -> list[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return list(zip(found, found[1:], found[2:], strict=False))
