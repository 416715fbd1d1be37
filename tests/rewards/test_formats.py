"""Rewards for the form of a completion; tests/parity compares think_format_reward with TRL's."""

import builtins
import json
from typing import Any

import pytest

from uniapl.errors import UsageError
from uniapl.rewards import formats
from uniapl.rewards.base import Rewarder, named_reward
from uniapl.rewards.finding import find_function
from uniapl.types import Example

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
PASSING = ['{"city": "Rome"}', ' {"city": "Rome",\n"people": 3}\n', '{"people": 3.0, "city": ""}']
FAILING = [
    '{"people": 3}',
    '{"city": "Rome", "people": 0}',
    '{"city": "Rome", "people": "3"}',
    '{"city": "Rome", "people": true}',
    '{"city": "Rome", "land": "Italy"}',
    '["city"]',
    '{"city": "Rome"',
    '{"city": "Rome",}',
    "{'city': 'Rome'}",
    '{"city": "Rome"} {"city": "Rome"}',
    '```json\n{"city": "Rome"}\n```',
    'Here: {"city": "Rome"}',
    '{"city": "Rome", "city": "Paris"}',
    '{"city": "Rome", "people": NaN}',
    '{"city": "Rome", "people": ' + "9" * 5000 + "}",
    "[" * 100_000,
    "",
]


def example(row: int, **columns: Any) -> Example:
    return Example(
        row=row, prompt="p", prompt_ids=(1,), demonstration=None, demonstration_ids=None, columns=columns
    )


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["mapping", "text"])
@pytest.mark.parametrize("place", ["args", "column"])
def test_json_schema(schema: Any, place: str) -> None:
    pytest.importorskip("jsonschema")
    texts = [*PASSING, *FAILING]
    given = schema if place == "args" else [schema] * len(texts)
    expected = [1.0] * len(PASSING) + [0.0] * len(FAILING)
    assert find_function("json_schema")(texts, given) == expected
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert find_function("json_schema")(chats, given) == expected


def test_json_schema_after_reasoning_and_per_row() -> None:
    pytest.importorskip("jsonschema")
    score = find_function("json_schema")
    texts = ["<think>3</think>\n4", "<think>4", '<think>{}</think>"4"']
    assert score(texts, {"type": "integer"}, answer_after="</think>") == [1, 0, 0]
    assert score(["4", "4", "4"], [{"type": "integer"}, {"type": "string"}, True]) == [1, 0, 1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integr"}, r"row 7: json_schema: invalid schema: 'integr' is not valid .* \(at \$.type\)"),
        ({"minimum": None}, r"row 7: json_schema: invalid schema: None is not of type 'number'"),
        ("{", r"row 7: json_schema: the schema is not JSON"),
        ("[1]", r"row 7: json_schema: a schema must be a mapping, not \[1\]"),
        (7, r"row 7: json_schema: a schema must be a mapping, not 7"),
    ],
)
def test_invalid_schemas_are_refused_with_their_row(schema: Any, message: str) -> None:
    pytest.importorskip("jsonschema")
    rewarder = Rewarder([named_reward("json_schema", find_function("json_schema"))])
    with pytest.raises(UsageError, match=message):
        rewarder.check_rows([example(1, schema=SCHEMA), example(7, schema=schema)])
    rewarder = Rewarder([named_reward("json_schema", find_function("json_schema"), args={"schema": schema})])
    with pytest.raises(UsageError, match=message.removeprefix("row 7: ")):
        rewarder.check_rows([example(1)])


def test_references_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonschema")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a request")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    [error] = find_function("json_schema")(["4"], {"$ref": "http://localhost:9/schema.json"})
    assert "Unresolvable" in repr(error)
    assert "a request" not in repr(error)
    local = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    assert find_function("json_schema")(["4", "4.5"], local) == [1.0, 0.0]


def test_without_jsonschema(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("jsonschema"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    formats._validator.cache_clear()
    with pytest.raises(UsageError, match=r"json_schema needs jsonschema: pip install 'uniapl\[jsonschema\]'"):
        find_function("json_schema")(["4"], True)
