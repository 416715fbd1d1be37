"""What a trajectory of the demo task with tools is worth: its reward, and metrics of an evaluation suite."""

import re
from typing import Any

from uniapl.demo.solvers import FORMS

ANSWER = re.compile(rf"(?:{'|'.join(FORMS)})(-?\d+)")


def solved(completions: list[Any], answer: list[int]) -> list[float]:
    """1 if the last turn is the right answer; how it was found does not matter."""
    return [float(number_in(one) == right) for one, right in zip(completions, answer, strict=True)]


def answered(completions: list[Any]) -> list[float]:
    """1 if the last turn is an answer, right or wrong, and not for example a call that cannot be read."""
    return [float(number_in(completion) is not None) for completion in completions]


def number_in(completion: str | list[dict[str, Any]]) -> int | None:
    """The answer in the last turn of a trajectory; None if that is not an answer."""
    last = {"content": completion} if isinstance(completion, str) else completion[-1]
    match = ANSWER.fullmatch(last["content"])
    return int(match[1]) if match else None
