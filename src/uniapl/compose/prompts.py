"""A base prompt with instructions that can be followed together."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.compose.wordings import FURTHER_CONFLICTS, KINDS, Arguments, say
from uniapl.rewards.checkers import conflicts

JOINERS = (" ", "\n", "\n\n")


def compose_prompt(
    base: str,
    rng: random.Random,
    kinds: Sequence[str],
    max_instructions: int,
    forbidden: Mapping[str, set[str]],
) -> dict[str, Any]:
    """A prompt with 1 to `max_instructions` instructions that can be followed together.

    Example:
        {"prompt": "Name a river. Do not use commas.", "instruction_id_list": ["punctuation:no_comma"],
         "kwargs": [{}]}
    """
    wanted = rng.randint(1, max_instructions)
    chosen: list[str] = []
    for kind in rng.sample(list(kinds), len(kinds)):
        if len(chosen) < wanted and not any(kind in forbidden[other] for other in chosen):
            chosen.append(kind)
    taken: set[str] = set()
    return with_instructions(base, {kind: KINDS[kind].draw(rng, base, taken) for kind in chosen}, rng)


def with_instructions(base: str, arguments: Mapping[str, Arguments], rng: random.Random) -> dict[str, Any]:
    """The columns of a prompt with these kinds of instructions."""
    sentences = [say(KINDS[kind], given, rng) for kind, given in arguments.items()]
    prompt = rng.choice(JOINERS).join([base, " ".join(sentences)])
    return {"prompt": prompt, "instruction_id_list": [*arguments], "kwargs": [*arguments.values()]}


def all_conflicts() -> dict[str, set[str]]:
    """The kinds that cannot be followed together with each kind; symmetric (lm-eval's table and ours)."""
    table = {kind: set(others) for kind, others in conflicts().items()}
    for kind, others in FURTHER_CONFLICTS.items():
        for other in others:
            table[kind].add(other)
            table[other].add(kind)
    return table
