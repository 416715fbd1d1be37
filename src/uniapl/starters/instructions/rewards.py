"""The reward of recipe.yaml: the fraction of a row's instructions that a completion follows."""


def followed(completions, max_words=None, include=None, ending=None):
    """Check the instructions of each row; None, no reward, for a row without any.

    A reward function takes lists, one entry per completion, and returns a list of numbers. Columns are
    passed by name; a column with a default may be missing in some rows, which then have None.
    """
    rewards = []
    for number, completion in enumerate(completions):
        # A row whose prompt is a list of messages has completions that are lists of messages.
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        checks = []
        if limit := max_words and max_words[number]:
            checks.append(0 < len(text.split()) <= limit)
        if word := include and include[number]:
            checks.append(word.lower() in text.lower())
        if phrase := ending and ending[number]:
            checks.append(text.rstrip().endswith(phrase))
        rewards.append(sum(checks) / len(checks) if checks else None)
    return rewards
