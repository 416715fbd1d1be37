"""ShareGPT and Alpaca rows, and columns that are renamed."""

from pathlib import Path
from typing import Any

import pytest

import uniapl
from support.runs import recipe, train
from support.tiny import make_tokenizer
from uniapl.config import DataConfig
from uniapl.data.rows import tokenize_rows, unused_columns
from uniapl.errors import UsageError
from uniapl.types import Example

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% endif %}"
)


def one(row: dict[str, Any], **config: Any) -> Example:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    return tokenize_rows([(7, row)], tokenizer, DataConfig(**config)).examples[0]


def both(example: Example) -> tuple[str, str | None]:
    decode = make_tokenizer().decode
    ids = example.demonstration_ids
    return decode(list(example.prompt_ids)), None if ids is None else decode(list(ids))


SHARED = [
    {"from": "system", "value": "be"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yo"},
]


def test_sharegpt_conversations_are_messages() -> None:
    example = one({"conversations": SHARED, "answer": "3"})
    assert both(example) == ("<turn>sbe<eos><turn>uhi<eos><turn>a", "yo<eos>")
    assert example.demonstration == "yo"
    assert example.prompt == [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert example.columns == {"conversations": SHARED, "answer": "3"}, "rewards get the column as it is"
    assert both(one({"conversations": SHARED[1:], "system": "be"})) == both(example)
    assert both(one({"chat": SHARED}, columns={"chat": "conversations"})) == both(example)
    assert both(one({"chat": SHARED}, columns={"chat": "messages"})) == both(example)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert both(one({"conversations": turns})) == ("<turn>uhi<eos><turn>a", "yo<eos>")
    assert both(one({"prompt": SHARED[:2], "completion": SHARED[2:]})) == both(example)
    assert one({"prompt": "a", "conversations": SHARED}).prompt == "a"


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (
            [{"from": "bing", "value": "hi"}],
            r"row 7: 'conversations': unknown 'from' 'bing'; expected one of",
        ),
        ([{"from": ["a"], "value": "hi"}], r"row 7: 'conversations': unknown 'from' \['a'\]"),
        ([{"from": "human"}], "row 7: 'messages' must be a string or a list of messages"),
        ("hi", "row 7: 'messages' must be a string or a list of messages"),
    ],
)
def test_other_conversations_are_refused(conversations: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one({"conversations": conversations})


def test_alpaca_rows() -> None:
    row = {"instruction": "Add.", "input": "a b", "output": "c", "id": "x"}
    example = one(row)
    assert both(example) == ("Add.\n\na b", "c<eos>")
    assert example.columns == row, "rewards get the columns as they are"
    assert both(one(row | {"input": ""})) == ("Add.", "c<eos>")
    assert both(one(row | {"input": None})) == ("Add.", "c<eos>")
    assert both(one({"instruction": "Add.", "input": "a b"})) == ("Add.\n\na b", None)
    renamed = {"instruction": "prompt", "output": "completion"}
    assert both(one(row | {"input": ""}, columns=renamed)) == ("Add.", "c<eos>")
    with pytest.raises(UsageError, match="row 7: the column 'input' of Alpaca's format is not a part of"):
        one(row, columns=renamed)
    assert both(one(row, columns=renamed | {"input": "numbers"})) == ("Add.", "c<eos>")
    with pytest.raises(UsageError, match="row 7: the columns 'system' and 'history'"):
        one(row | {"history": [["a", "b"]]})
    with pytest.raises(UsageError, match="row 7: 'instruction' and 'input' must be text"):
        one(row | {"input": 3})


@pytest.mark.case(18)
def test_a_renamed_column_has_both_names_for_rewards(model_dir: Path, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b c"}, {"question": "d", "answer": "e f"}]
    seen: set[str] = set()

    def last_word(completions: list[str], answer: list[str], question: list[str]) -> list[float]:
        seen.update(f"{q}: {a}" for q, a in zip(question, answer, strict=True))
        return [float(len(text)) for text in completions]

    columns = {"question": "prompt", "answer": "completion"}
    values = recipe(model_dir, tmp_path / "run", max_steps=1, data={"columns": columns})
    train(values, train_dataset=rows, reward_functions=[last_word])
    assert seen == {"a: b c", "d: e f"}
    example = one(rows[0], columns=columns)
    assert both(example) == ("a", "b c<eos>")
    assert example.columns == rows[0]


def test_names_can_be_exchanged() -> None:
    row = {"prompt": "number 3", "question": "a", "messages": "kept", "answer": "b"}
    columns = {"prompt": "id", "question": "prompt", "messages": "log", "answer": "gold"}
    example = one(row, columns=columns)
    assert both(example) == ("a", None)
    assert example.columns == {"id": "number 3", "question": "a", "log": "kept", "answer": "b", "gold": "b"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": "prompt"}, "data.columns renames 'a' to 'prompt', which is also a column"),
        ({"prompt": "a"}, "data.columns renames 'prompt' to 'a', which is also a column"),
        ({"a": "c", "prompt": "c"}, "data.columns renames 'a' to 'c', and 'prompt' too"),
    ],
)
def test_two_columns_with_one_name_are_refused(columns: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one({"prompt": "x", "a": "y"}, columns=columns)


def test_a_misspelt_column_is_reported() -> None:
    rows = [(1, {"question": "a"}), (2, {"answer": "b"})]
    columns = {"question": "prompt", "anser": "completion", "answer": "gold"}
    assert unused_columns(rows, DataConfig(columns=columns)) == ["data.columns: no row has a column 'anser'"]
    assert issubclass(uniapl.UsageError, UsageError)
