"""Tool calls are read in the form in which the chat template writes them."""

import json
from typing import Any

import pytest

from support.templates import FAMILIES, READ, byte_tokenizer, family, template
from uniapl.data.rendering import ChatTemplate
from uniapl.errors import UsageError
from uniapl.tools.calls import CallParser

SCHEMA = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "q"},
                "count": {"type": "integer", "description": "n"},
                "exact": {"type": "boolean", "description": "e"},
            },
            "required": ["query"],
        },
    },
}
USER = {"role": "user", "content": "?"}


def parser(name: str) -> CallParser:
    tokenizer: Any = family(name)
    form = ChatTemplate(tokenizer=tokenizer, arguments={}, tools=[SCHEMA])
    return CallParser.of(form, {tokenizer.eos_token_id})


def written(subject: CallParser, *calls: dict[str, Any]) -> str:
    form = ChatTemplate(tokenizer=subject.tokenizer, arguments={}, tools=[SCHEMA])
    functions = [{"type": "function", "function": call} for call in calls]
    return form.completion([USER], {"role": "assistant", "content": "", "tool_calls": functions})


def ids_of(subject: CallParser, text: str) -> tuple[int, ...]:
    return tuple(subject.tokenizer(text, add_special_tokens=False).input_ids)


def functions(subject: CallParser, text: str) -> list[dict[str, Any]]:
    found = subject.read(ids_of(subject, text))
    assert not found.malformed
    return [call["function"] for call in found.calls]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("query", ["Paris", "two\nlines", 'a "quoted" <b>', "Zürich 東京", "7"])
def test_calls_are_read_as_they_are_written(name: str, query: str) -> None:
    subject = parser(name)
    call = {"name": "find", "arguments": {"query": query, "count": 3, "exact": True}}
    text = written(subject, call)
    assert functions(subject, text.rstrip()) == [call]
    assert functions(subject, text.rstrip().removesuffix(READ[name])) == [call], "truncated after it"


@pytest.mark.parametrize("name", [name for name in READ if not name.startswith("llama")])
def test_several_calls_and_a_thought(name: str) -> None:
    subject = parser(name)
    calls = [{"name": "find", "arguments": {"query": query}} for query in ("a", "b")]
    text = written(subject, *calls).rpartition("</think>")[2].strip()
    assert functions(subject, text) == calls
    assert functions(subject, f"<think>call {text} now?</think>{text}") == calls, "a thought calls nothing"


@pytest.mark.parametrize("name", READ)
def test_answers_call_nothing(name: str) -> None:
    subject = parser(name)
    for text in ("", "88", "I would call find(query)", "</tool_call>", '{"name": 3}'):
        assert functions(subject, text) == []


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "find", "arguments": </tool_call>',
        '<tool_call>{"name": "find"',
        "<tool_call>",
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>"find"</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "find", "arguments": {"query": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "find\\udfff", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "find", "arguments": {"\\ud800": [1]}}</tool_call>',
        '<tool_call>{"name": "find", "arguments": {"query": ' + "[" * 900 + "]" * 900 + "}}</tool_call>",
        "<tool_call>" * 2000,
        "<tool_call>" + "[" * 3000,
    ],
)
def test_malformed_calls_are_recognised(text: str) -> None:
    subject = parser("qwen3")
    found = subject.read(ids_of(subject, text))
    assert (found.calls, found.malformed) == ([], True)


def test_calls_may_nest_and_have_escapes() -> None:
    subject = parser("qwen3")
    nested = json.dumps([[[{"a": ["\U0001f600"]}]]])
    assert "\\ud83d\\ude00" in nested
    text = f'<tool_call>{{"name": "find", "arguments": {{"query": {nested}}}}}</tool_call>'
    assert functions(subject, text) == [{"name": "find", "arguments": {"query": json.loads(nested)}}]


def test_an_unknown_format_needs_the_tokenizer_s_response_template() -> None:
    with pytest.raises(UsageError, match=r"no known format reads the tool calls .*response_template"):
        parser("lfm2_v2")
    tokenizer: Any = byte_tokenizer(template("lfm2_v2"), FAMILIES["lfm2_v2"])
    form = ChatTemplate(tokenizer=tokenizer, arguments={}, tools=[SCHEMA])
    tokenizer.response_template = {"fields": {"content": {"content": "text"}}}
    with pytest.raises(UsageError, match="the tokenizer's response_template does not read"):
        CallParser.of(form, {tokenizer.eos_token_id})
