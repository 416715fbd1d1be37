"""A single call of a reward function: its arguments, its time limit and the check of its result."""

import asyncio
import copy
import functools
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from uniapl.threads import DeadlineError, call_with_deadline
from uniapl.types import Example

Value = float | None | Exception
"""A function's result for one completion: a score, None ("does not apply"), or why it could not be scored."""


class RewardTimeoutError(Exception):
    """A call exceeded its time limit. (A TimeoutError may be the function's own, for one sample.)"""


class WrongFormError(ValueError):
    """A reward function did not return one number, None or exception per completion."""


def arguments_of(
    function: functools.partial[Any],
    examples: list[Example],
    texts: list[str],
    completion_ids: list[list[int]],
) -> dict[str, Any]:
    """The arguments that the function's parameters name; all of them if it takes ``**kwargs``."""
    everything: dict[str, Any] = {
        # Copied, so that a function that modifies its arguments does not modify the data of later steps.
        column: [copy.deepcopy(example.columns.get(column)) for example in examples]
        for column in {column for example in examples for column in example.columns}
    }
    everything["prompts"] = [example.prompt for example in examples]
    everything["completions"] = [
        text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        for example, text in zip(examples, texts, strict=True)
    ]
    everything["completion_ids"] = completion_ids
    parameters = inspect.signature(function.func).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = (everything if takes_any else everything.keys() & parameters.keys()) - function.keywords.keys()
    return {name: everything[name] for name in names}


def call(
    function: Callable[..., Any], arguments: dict[str, Any], timeout: float | None, count: int
) -> list[Value]:
    """The function's `count` values, awaited if it is async.

    A call of sys.exit() is an error like any other and does not end the run. A thread cannot be killed: a
    function that hangs keeps its thread, which is a daemon and therefore does not keep the process alive.

    Args:
        timeout: Seconds; None calls the function in this thread, without a limit.

    Raises:
        RewardTimeoutError: The function did not return in time.
        WrongFormError: It returned something else than `count` values.
    """

    def run() -> list[Value]:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        return _checked(result, count)

    # With a limit the call has its own thread, which Ctrl-C never reaches: every exception is the function's.
    foreign = (SystemExit, asyncio.CancelledError) if timeout is None else BaseException

    def guarded() -> list[Value]:
        try:
            return run()
        except Exception:
            raise
        except foreign as error:
            raise RuntimeError(repr(error)) from error

    try:
        return call_with_deadline(guarded, timeout)
    except DeadlineError:
        raise RewardTimeoutError(f"timed out after {timeout} s") from None


def error_location(error: Exception) -> str:
    """File and line of the user's code that raised the error, in parentheses."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f" ({Path(last.filename).name}, line {last.lineno})" if last and last.filename != __file__ else ""


async def _awaited(result: Any) -> Any:
    return await result


def _checked(result: Any, count: int) -> list[Value]:
    """The result as floats, Nones and exceptions; raises WrongFormError."""
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise WrongFormError(
            f"must return a list with one value per completion, returned {type(result).__name__}"
        )
    # A generator may be infinite.
    values = list(itertools.islice(result, count + 1))
    if len(values) != count:
        found = len(values) if len(values) < count else f"more than {count}"
        raise WrongFormError(f"returned {found} values for {count} completions")
    return [value if value is None or isinstance(value, Exception) else _as_float(value) for value in values]


def _as_float(value: Any) -> float:
    if isinstance(value, str):
        raise WrongFormError(f"returned the text {value!r:.80} where a number or None was expected")
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as error:
        raise WrongFormError(f"returned {value!r:.80} where a number or None was expected") from error
