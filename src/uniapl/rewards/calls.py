"""A single call of a reward function: its arguments, its time limit and the check of its result."""

import asyncio
import copy
import functools
import inspect
import itertools
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uniapl.rewards import event_loop
from uniapl.rewards.event_loop import RewardTimeoutError, loop_thread
from uniapl.threads import DeadlineError, call_with_deadline
from uniapl.types import Example
from uniapl.untyped import is_iterable

Completion = str | list[dict[str, Any]]
"""The text of a completion, or the messages of a trajectory."""
Value = float | None | Exception
"""A function's result for one completion: a score, None ("does not apply"), or why it could not be scored."""


class FailedStart(Exception):
    """Takes the place of a rollout's environment that could not be made or reset."""


class WrongFormError(ValueError):
    """A reward function did not return one number, None or exception per completion, or log one value."""


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calls return coroutines, also of a partial or of an object with an async `__call__`."""
    return _is(function, inspect.iscoroutinefunction)


def is_async_generator(function: Callable[..., Any]) -> bool:
    """Whether calls return async generators: `async def` with `yield`."""
    return _is(function, inspect.isasyncgenfunction)


def _is(function: Any, kind: Callable[[Any], bool]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or kind(type(function).__call__)


def arguments_of(
    function: functools.partial[Any],
    examples: list[Example],
    texts: list[Completion],
    completion_ids: list[list[int]],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments that the function's parameters name; all of them if it takes ``**kwargs``.

    Args:
        run: The arguments that do not depend on the samples.
    """
    everything: dict[str, Any] = {
        # Copied, so that a function that modifies its arguments does not modify the data of later steps.
        column: [copy.deepcopy(example.columns.get(column)) for example in examples]
        for column in {column for example in examples for column in example.columns}
    }
    everything["prompts"] = [copy.deepcopy(example.prompt) for example in examples]
    everything["completions"] = [
        [{"role": "assistant", "content": completion}]
        if isinstance(completion, str) and not isinstance(example.prompt, str)
        else completion
        for example, completion in zip(examples, texts, strict=True)
    ]
    everything["completion_ids"] = completion_ids
    everything |= run
    parameters = inspect.signature(function.func).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = (everything if takes_any else everything.keys() & parameters.keys()) - function.keywords.keys()
    return {name: everything[name] for name in names}


def call(
    function: Callable[..., Any], arguments: dict[str, Any], timeout: float | None, count: int
) -> list[Value]:
    """The function's `count` values, awaited in the process's event loop if it is async.

    A call of sys.exit() is an error like any other and does not end the run. A thread cannot be killed: a
    function that hangs keeps its thread, which is a daemon and therefore does not keep the process alive. An
    async function is cancelled.

    Args:
        timeout: Seconds; None sets no limit, and calls a function that is not async in this thread.

    Raises:
        RewardTimeoutError: The function did not return in time.
        WrongFormError: It returned something else than `count` values.
    """

    def run() -> list[Value]:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = loop_thread().result_of(result, timeout)
        return _checked(result, count)

    # The event loop applies the limit to an async function.
    deadline = None if is_async(function) else timeout
    # With one the call has its own thread, which Ctrl-C never reaches: every exception is the function's.
    foreign = (SystemExit, asyncio.CancelledError) if deadline is None else BaseException

    def guarded() -> list[Value]:
        try:
            return run()
        except Exception:
            raise
        except foreign as error:
            raise RuntimeError(repr(error)) from error

    try:
        return call_with_deadline(guarded, deadline)
    except DeadlineError:
        raise RewardTimeoutError(f"timed out after {timeout} s") from None


def error_location(error: Exception) -> str:
    """File and line of the user's code that raised the error, in parentheses."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    ours = (__file__, event_loop.__file__)
    return f" ({Path(last.filename).name}, line {last.lineno})" if last and last.filename not in ours else ""


def _checked(result: Any, count: int) -> list[Value]:
    """The result as floats, Nones and exceptions; raises WrongFormError."""
    kind = type(result).__name__
    # A set has no order.
    if isinstance(result, (str, bytes, dict, set, frozenset)) or not is_iterable(result):
        raise WrongFormError(f"must return a list with one value per completion, returned {kind}")
    # A generator may be infinite.
    values = list(itertools.islice(result, count + 1))
    if len(values) != count:
        found = len(values) if len(values) < count else f"more than {count}"
        raise WrongFormError(f"returned {found} values for {count} completions")
    return [value if value is None or isinstance(value, Exception) else _as_float(value) for value in values]


def _as_float(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise WrongFormError(f"returned the text {value!r:.80} where a number or None was expected")
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise WrongFormError(f"returned {value!r:.80} where a number or None was expected") from error
