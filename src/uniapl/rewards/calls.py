"""One call of a reward function: its arguments, its time, and the form of what it returns."""

import asyncio
import copy
import functools
import inspect
import itertools
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from uniapl.types import Example

Value = float | None | Exception
"""What a function says of one completion: a score, "does not apply", or why it could not score it."""


class RewardTimeoutError(Exception):
    """A call did not end in time. (A TimeoutError may be the function's own, about one sample.)"""


class WrongFormError(ValueError):
    """A reward function returned something else than one number or None per completion."""


def arguments_of(
    function: functools.partial[Any],
    examples: list[Example],
    texts: list[str],
    completion_ids: list[list[int]],
) -> dict[str, Any]:
    """What the function's parameters name, or everything if it takes ``**kwargs``."""
    everything: dict[str, Any] = {
        # A copy: a function that changes its arguments must not change the data of later steps.
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
    everything = {key: value for key, value in everything.items() if key not in function.keywords}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return everything
    return {key: value for key, value in everything.items() if key in parameters}


def call(
    function: Callable[..., Any], arguments: dict[str, Any], timeout: float | None, count: int
) -> list[Value]:
    """The function's `count` values, awaited if it is async; RewardTimeoutError after `timeout` seconds.

    A function that calls sys.exit() does not end the run: that is an error like others.
    A thread cannot be killed: one that hangs is left behind as a daemon and cannot keep the run from ending.
    """

    def run() -> list[Value]:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        return _checked(result, count)

    if timeout is None:
        try:
            return run()
        except SystemExit as error:
            raise RuntimeError(repr(error)) from error
    outcome: list[list[Value]] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(run())
        except BaseException as error:  # carried over to the calling thread, below
            failure.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise RewardTimeoutError(f"no answer within {timeout} s")
    if failure:
        error = failure[0]
        raise error if isinstance(error, Exception) else RuntimeError(repr(error))
    return outcome[0]


def error_location(error: Exception) -> str:
    """Where in the user's file an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f" ({Path(last.filename).name}, line {last.lineno})" if last and last.filename != __file__ else ""


async def _awaited(result: Any) -> Any:
    return await result


def _checked(result: Any, count: int) -> list[Value]:
    """The result as floats, Nones and exceptions, or a WrongFormError that says what is wrong with it."""
    if isinstance(result, (str, bytes, dict)) or not isinstance(result, Iterable):
        raise WrongFormError(
            f"must return a list with one value per completion, returned {type(result).__name__}"
        )
    # No more than can be used: a generator may have no end.
    values = list(itertools.islice(result, count + 1))
    if len(values) != count:
        found = len(values) if len(values) < count else f"more than {count}"
        raise WrongFormError(f"returned {found} values for {count} completions")
    checked: list[Value] = []
    for value in values:
        if value is None or isinstance(value, Exception):
            checked.append(value)
            continue
        try:
            checked.append(float(value.item() if hasattr(value, "item") else value))
        except (TypeError, ValueError) as error:
            raise WrongFormError(f"returned {value!r:.80} where a number or None belongs") from error
        if isinstance(value, str):
            raise WrongFormError(f"returned the text {value!r:.80} where a number or None belongs")
    return checked
