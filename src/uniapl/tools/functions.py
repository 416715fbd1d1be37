"""Tools as functions: where they are found, what the chat template shows of them, and how they are called."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from transformers.utils.chat_template_utils import get_json_schema

from uniapl.errors import UsageError
from uniapl.rewards.calls import is_async
from uniapl.rewards.event_loop import RewardTimeoutError, loop_thread
from uniapl.rewards.finding import find_function
from uniapl.threads import DeadlineError, call_with_deadline

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the policy can call."""

    name: str
    function: Callable[..., Any]
    schema: Mapping[str, Any]
    """JSON schema, in the form that chat templates take."""


class ToolResult(NamedTuple):
    """What the policy reads after a call."""

    content: str
    failed: bool
    """There is no such tool, the call raised an exception, or it did not return in time."""
    late: bool = False
    """It did not return in time."""


def find_tools(names: Sequence[str]) -> list[Tool]:
    """The tools at `module:function` or `path.py:function`.

    Raises:
        UsageError: One does not exist or cannot be described, or two have the same name.
    """
    tools = [tool_of(find_function(name, kind="tool")) for name in names]
    known = [tool.name for tool in tools]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise UsageError(f"rollout.tools: two tools have the name '{twice}'; rename one")
    return tools


def tool_of(function: Callable[..., Any]) -> Tool:
    """Describe a function by its type hints and its docstring, as transformers does.

    Raises:
        UsageError: An argument has no type hint or no description.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        schema = get_json_schema(function)
    except Exception as error:  # transformers has exceptions of its own for each reason
        raise UsageError(
            f"tool '{name}' cannot be described: {error}; it needs a docstring with a section 'Args:' that "
            "describes each argument, and type hints"
        ) from error
    return Tool(name=str(schema["function"]["name"]), function=function, schema=schema)


def call_tool(
    tools: Mapping[str, Tool], name: str, arguments: Any, *, timeout: float, max_characters: int
) -> ToolResult:
    """Call a tool. An error is its result, which the policy reads, as in TRL.

    That includes exceptions that would end a program (SystemExit, KeyboardInterrupt, MemoryError). A call
    that hangs is left behind in its thread, which does not keep the process alive. A tool runs in the
    training process: what it prints is a part of the run's output, and a working directory that it changes
    stays changed, for other tools too; the paths of the run do not depend on it.

    Args:
        arguments: As parsed from the completion, so of any form.
        timeout: Seconds.
        max_characters: Longer results are cut, with a note of how much is missing.
    """
    tool = tools.get(name)
    if tool is None:
        known = ", ".join(sorted(tools)) or "none"
        return _failure(f"there is no tool '{name}'; tools: {known}", max_characters)
    if not isinstance(arguments, Mapping):
        return _failure(f"the arguments of '{name}' must be an object", max_characters)
    try:
        inspect.signature(tool.function).bind(**arguments)
        return ToolResult(_cut(awaited(tool.function, arguments, timeout, read=_text), max_characters), False)
    except (DeadlineError, RewardTimeoutError):
        late = _failure(f"'{name}' did not answer within {timeout:g} s", max_characters)
        return late._replace(late=True)
    except Exception as error:
        return _failure(str(error) or repr(error), max_characters)


def awaited(
    function: Callable[..., Any], arguments: Mapping[str, Any], timeout: float, *, read: Callable[[Any], T]
) -> T:
    """What a sync or async function returns, within a time limit.

    All of its code runs in another thread and raises no more than an Exception.

    Args:
        function: The user's.
        arguments: By name.
        timeout: Seconds.
        read: Makes the value of what the function returned, within the limit too.
    """
    if is_async(function):

        async def later() -> T:
            return read(await function(**arguments))

        return loop_thread().result_of(later(), timeout)

    def work() -> T:
        try:
            return read(function(**arguments))
        except Exception:
            raise
        except BaseException as error:  # not Ctrl-C, which interrupts the main thread only
            raise RuntimeError(repr(error)) from error

    return call_with_deadline(work, timeout)


def _text(value: Any) -> str:
    """The text of a result: TRL's `str`, but JSON for lists and mappings, which models were trained on."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def not_called(name: str, max_characters: int) -> ToolResult:
    """The result of a call after one of the same turn that did not return in time."""
    return _failure(f"'{name}' was not called: an earlier call did not answer in time", max_characters)


def _failure(message: str, max_characters: int) -> ToolResult:
    return ToolResult(_cut(_text({"error": message}), max_characters), failed=True)


def without_surrogates(text: str) -> str:
    """The text with escapes for halves of surrogate pairs, which cannot be encoded.

    Python has them in file names that are not UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _cut(text: str, limit: int) -> str:
    text = without_surrogates(text)
    if len(text) <= limit:
        return text
    return f"{text[:limit]}... ({len(text) - limit} more characters)"
