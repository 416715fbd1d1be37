"""The reward of recipe.yaml: 1 for the right number, 0 for another one."""

import re


def same_number(completions, answer):
    """Compare the number after `####` with the column `answer`; without one the reward is 0.

    A reward function takes lists, one entry per completion, and returns a list of numbers. Columns are
    passed by name.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        # A row whose prompt is a list of messages has completions that are lists of messages.
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        found = re.search(r"#### *(-?[\d,]*\.?\d+)", text)
        rewards.append(float(found is not None and float(found[1].replace(",", "")) == float(expected)))
    return rewards
