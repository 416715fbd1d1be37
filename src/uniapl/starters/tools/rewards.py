"""The tool and the reward of recipe.yaml."""

import re

AGES = {"Ada": 36, "Alan": 41, "Grace": 85, "Linus": 54, "Margaret": 88}


def age(name: str) -> int:
    """Look up the age of a person.

    Args:
        name: The person's first name.
    """
    if name not in AGES:
        raise ValueError(f"no person is named {name}; known names: {', '.join(AGES)}")
    return AGES[name]


def has_answer(completions, answer):
    """1 if the last number of the last message is the column `answer`.

    A reward function takes lists, one entry per completion, and returns a list of numbers. Columns are
    passed by name.
    """
    rewards = []
    for messages, expected in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", messages[-1]["content"] or "")
        rewards.append(float(bool(numbers) and int(numbers[-1]) == expected))
    return rewards
