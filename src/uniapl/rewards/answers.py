"""Reward functions that compare a completion's final answer with the row's solution.

`accuracy_reward` and `reasoning_accuracy_reward` are TRL's, with the same values. `exact_match` needs no
further package.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from uniapl.errors import UsageError
from uniapl.rewards.base import RowCheck
from uniapl.rewards.builtin import completion_text
from uniapl.rewards.finding import register
from uniapl.rewards.math_process import Comparison, MathProcess
from uniapl.types import Example

LogExtra = Callable[[str, list[Any]], None]
NUMBER = re.compile(r"([-+]?)[$€£]?([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?%?\.?", re.ASCII)
"""A number with at most one currency sign, thousands separators, a percent sign and a full stop."""

_math = MathProcess()


@register("accuracy_reward")
def accuracy_reward(
    completions: list[Any], solution: list[Any], log_extra: LogExtra | None = None
) -> list[float | Exception | None]:
    r"""1.0 if math-verify finds the answer, in \boxed{} or other LaTeX, equal to the solution, else 0.0.

    None if the solution cannot be parsed. More than 5 s of processor time for an answer counts as wrong.
    """
    return _accuracy([completion_text(completion) for completion in completions], solution, log_extra)


@register("reasoning_accuracy_reward")
def reasoning_accuracy_reward(
    completions: list[Any],
    solution: list[Any],
    log_extra: LogExtra | None = None,
    *,
    reasoning_delimiters: Sequence[str] = ("</think>",),
) -> list[float | Exception | None]:
    """:func:`accuracy_reward` of the text after the reasoning; 0.0 if no delimiter ends the reasoning.

    Args:
        reasoning_delimiters: The first of these that the completion contains is used, at its last occurrence.
    """
    texts: list[str | None] = []
    for text in map(completion_text, completions):
        delimiter = next((mark for mark in reasoning_delimiters if mark in text), None)
        texts.append(None if delimiter is None else text.split(delimiter)[-1])
    return _accuracy(texts, solution, log_extra)


def _accuracy(
    texts: Sequence[str | None], solutions: Sequence[Any], log_extra: LogExtra | None
) -> list[float | Exception | None]:
    """The rewards; a text of None is a completion whose reasoning does not end."""
    found = [
        Comparison(0.0, "[incomplete reasoning]", "[incomplete reasoning]")
        if text is None
        else _math.compare(as_text(solution), text)
        for text, solution in zip(texts, solutions, strict=True)
    ]
    if log_extra is not None:
        log_extra("solution", list(solutions))
        log_extra("gold_parsed", [one.gold for one in found])
        log_extra("answer_parsed", [one.answer for one in found])
    return [one.reward for one in found]


def check_solutions(examples: Sequence[Example], **_: Any) -> RowCheck:
    """Find rows whose solution math-verify cannot parse.

    Raises:
        UsageError: math-verify is not installed, or a solution is neither text nor a number.
    """
    reason = r"whose 'solution' math-verify cannot parse (LaTeX needs $...$ or \boxed{...})"
    return RowCheck(
        unusable={
            example.row: reason
            for example in examples
            if _math.compare(_text_of(example, "solution")).gold == "[unparseable]"
        }
    )


@register("exact_match")
def exact_match(
    completions: list[Any], answer: list[Any], *, pattern: str = r"####\s*([^#\n]+)"
) -> list[float | None]:
    """1.0 if the text after the pattern's last match equals that of the row's `answer`, else 0.0.

    Two numbers are equal if their values are: "1,018", "$1018" and "1018.00" are one number. Other texts must
    be identical. None if the row has no final answer.

    Args:
        pattern: Regular expression whose first group (or all of it) is the final answer. The default is
            GSM8K's. An `answer` in which it does not occur is itself the final answer.
    """
    expression = _compiled(pattern)
    rewards: list[float | None] = []
    for completion, solution in zip(completions, answer, strict=True):
        gold = _gold(as_text(solution), expression)
        ours = _final(completion_text(completion), expression)
        rewards.append(None if gold is None else float(ours is not None and _same(ours, gold)))
    return rewards


def check_answers(examples: Sequence[Example], *, pattern: str = r"####\s*([^#\n]+)") -> RowCheck:
    """Find rows without a final answer.

    Raises:
        UsageError: The pattern is invalid, or an answer is neither text nor a number.
    """
    expression = _compiled(pattern)
    return RowCheck(
        unusable={
            example.row: "whose 'answer' is empty, or has several lines without the pattern"
            for example in examples
            if _gold(_text_of(example, "answer"), expression) is None
        }
    )


def as_text(value: Any) -> str:
    """A solution as text; a number in the data is written as Python writes it.

    Raises:
        ValueError: The value is neither text nor a number.
    """
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"must be text or a number, not {value!r:.80}")
    return str(value)


def _text_of(example: Example, column: str) -> str:
    try:
        return as_text(example.columns[column])
    except ValueError as error:
        raise UsageError(f"row {example.row}: '{column}' {error}") from error


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UsageError(f"exact_match: the pattern {pattern!r:.80} is invalid: {error}") from error


def _gold(solution: str, expression: re.Pattern[str]) -> str | None:
    found = _final(solution, expression)
    whole = solution.strip()
    return found if found is not None else whole if whole and "\n" not in whole else None


def _final(text: str, expression: re.Pattern[str]) -> str | None:
    """The final answer of a text; None if there is none or it is empty."""
    matches = list(expression.finditer(text))
    if not matches:
        return None
    found = matches[-1][1] if expression.groups else matches[-1][0]
    return (found or "").strip() or None


def _same(ours: str, gold: str) -> bool:
    numbers = _number(ours), _number(gold)
    return ours == gold if None in numbers else numbers[0] == numbers[1]


def _number(text: str) -> Decimal | None:
    """The value of a text that is one number, such as -$1,018.50; None for any other text."""
    match = NUMBER.fullmatch(text.replace("−", "-"))  # noqa: RUF001 - the minus sign
    if match is None or not (match[3] or match[4]) or (match[1] and match[2]):
        return None
    whole = (match[3] or "0").replace(",", "")
    return Decimal(f"{match[1] or match[2]}{whole}{match[4] or ''}")


accuracy_reward.check_rows = check_solutions  # type: ignore[attr-defined]
reasoning_accuracy_reward.check_rows = check_solutions  # type: ignore[attr-defined]
exact_match.check_rows = check_answers  # type: ignore[attr-defined]
