"""Tools: how they are described and called, and what the policy reads when a call goes wrong."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from uniapl.errors import UsageError
from uniapl.tools.functions import Tool, ToolResult, call_tool, find_tools, tool_of


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


async def slow_add(a: int, b: int) -> dict[str, int]:
    """Add two numbers later.

    Args:
        a: The first.
        b: The second.
    """
    await asyncio.sleep(0.01)
    return {"sum": a + b}


def without_hint(a, b: int):  # type: ignore[no-untyped-def]
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def without_description(a: int) -> int:
    """Add nothing."""
    return a


def called(function: Any, arguments: Any, *, timeout: float = 5.0, most: int = 100) -> ToolResult:
    tool = tool_of(function)
    return call_tool({tool.name: tool}, tool.name, arguments, timeout=timeout, max_characters=most)


def error_of(result: ToolResult) -> str:
    assert result.failed
    return json.loads(result.content)["error"]


def test_a_tool_is_described_by_its_hints_and_its_docstring() -> None:
    tool = tool_of(add)
    assert tool.name == "add"
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "The first."},
                    "b": {"type": "integer", "description": "The second."},
                },
                "required": ["a"],
            },
            "return": {"type": "integer"},
        },
    }


@pytest.mark.parametrize("function", [without_hint, without_description])
def test_a_tool_without_hints_or_descriptions_is_refused(function: Any) -> None:
    with pytest.raises(UsageError, match=rf"tool '{function.__name__}' cannot be described: .*'Args:'"):
        tool_of(function)


def test_results_are_text() -> None:
    assert called(add, {"a": 2, "b": 3}) == ToolResult("5", failed=False)
    assert called(add, {"a": 2}) == ToolResult("3", failed=False)
    assert called(slow_add, {"a": 2, "b": 3}) == ToolResult('{"sum": 5}', failed=False)
    texts = {"text": "a\nb", "none": None, "list": [1, "ä"], "object": object}
    for value, expected in zip(texts.values(), ("a\nb", "null", '[1, "ä"]', "<class 'object'>"), strict=True):
        tool = Tool(name="t", function=lambda value=value: value, schema={})
        found = call_tool({"t": tool}, "t", {}, timeout=1, max_characters=50)
        assert found == ToolResult(expected, failed=False)


def fail() -> int:
    """Fail."""
    raise KeyError("no such key")


def leave() -> int:
    """Leave."""
    sys.exit(3)


def hang() -> int:
    """Hang."""
    time.sleep(60)
    return 1


async def hang_later() -> int:
    """Hang."""
    await asyncio.sleep(60)
    return 1


def interrupt() -> int:
    """Interrupt."""
    raise KeyboardInterrupt


async def interrupt_later() -> int:
    """Interrupt."""
    await asyncio.sleep(0)
    raise KeyboardInterrupt


def exhaust() -> int:
    """Exhaust."""
    raise MemoryError


class Hanging:
    def __str__(self) -> str:
        time.sleep(60)
        return "x"


def hang_as_text() -> Hanging:
    """Hang."""
    return Hanging()


def flood() -> str:
    """Flood."""
    return "x" * 1_000_000


def test_what_goes_wrong_is_read_by_the_policy() -> None:
    assert error_of(called(fail, {})) == "'no such key'"
    assert error_of(called(leave, {})) == "SystemExit(3)"
    assert error_of(called(interrupt, {})) == error_of(called(interrupt_later, {})) == "KeyboardInterrupt()"
    assert error_of(called(exhaust, {})) == "MemoryError()"
    assert error_of(called(add, {"a": "x"})).startswith("can only concatenate")
    assert error_of(called(add, {"c": 1})) == "missing a required argument: 'a'"
    assert error_of(called(add, {"a": 1, "c": 1})) == "got an unexpected keyword argument 'c'"
    for arguments in ("text", [1], None, 3):
        assert error_of(called(add, arguments)) == "the arguments of 'add' must be an object"
    found = call_tool({"add": tool_of(add)}, "ad", {}, timeout=1, max_characters=100)
    assert error_of(found) == "there is no tool 'ad'; tools: add"
    assert error_of(call_tool({}, "ad", {}, timeout=1, max_characters=100)).endswith("tools: none")


@pytest.mark.parametrize("function", [hang, hang_later, hang_as_text])
def test_a_call_that_hangs_ends(function: Any) -> None:
    begin = time.monotonic()
    tool = Tool(name=function.__name__, function=function, schema={})
    found = call_tool({tool.name: tool}, tool.name, {}, timeout=0.2, max_characters=100)
    assert error_of(found) == f"'{function.__name__}' did not answer within 0.2 s"
    assert time.monotonic() - begin < 10


def test_long_results_are_cut() -> None:
    assert called(flood, {}, most=10).content == "xxxxxxxxxx... (999990 more characters)"
    long = call_tool({}, "x" * 1_000_000, {}, timeout=1, max_characters=30)
    assert len(long.content) < 70


def test_results_can_be_encoded() -> None:
    """`os.listdir` has such a text for a file name that is not UTF-8; no tokenizer takes it."""

    def listed() -> str:
        """List."""
        return "a\udcff \U0001f600"

    def missing() -> str:
        """Fail."""
        raise FileNotFoundError("a\udcff")

    assert called(listed, {}).content == "a\\udcff \U0001f600"
    assert called(missing, {}).content == '{"error": "a\\udcff"}'


def test_tools_are_found_in_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).read_text().split("def called")[0]
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    names = [tool.name for tool in find_tools([f"{tmp_path / 'mine.py'}:add", "mine:slow_add"])]
    assert names == ["add", "slow_add"]
    for wrong, message in {
        "mine.py:sub": "tool 'mine.py:sub': 'mine.py' has no function 'sub'; it defines: add",
        "add": "unknown tool 'add': use `module:function` or `path.py:function`",
        "nowhere:add": "tool 'nowhere:add': cannot import 'nowhere'",
        "exact_match": "unknown tool 'exact_match'",
    }.items():
        with pytest.raises(UsageError, match=message):
            find_tools([wrong])
    with pytest.raises(UsageError, match="two tools have the name 'add'"):
        find_tools(["mine.py:add", "mine:add"])
