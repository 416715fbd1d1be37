"""Tokenisation of rows, chat templates, errors that name the row, and the streams."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.tiny import make_tokenizer
from uniapl.config import DataConfig
from uniapl.data.reading import read_rows
from uniapl.data.rows import Dataset, tokenize_rows
from uniapl.data.streams import Stream, split_streams
from uniapl.errors import UsageError
from uniapl.types import Example

EOS = 1
# Writes "<turn>role:content<eos>\n" for each turn; with `thinking` off it opens an answer with ",,".
TEMPLATE = (
    "{% for m in messages %}"
    "<turn>{{ m.role[0] }}{% if m.role == 'assistant' and thinking is false %},,{% endif %}"
    "{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% if thinking is false %},,{% endif %}{% endif %}"
)


def one(row: dict[str, Any], template: str | None = None, **config: Any) -> Example:
    tokenizer = make_tokenizer(chat_template=template)
    return tokenize_rows([(7, row)], tokenizer, DataConfig(**config)).examples[0]


def text(ids: tuple[int, ...] | None) -> str:
    return make_tokenizer().decode(list(ids or ()))


def test_plain_prompt_and_completion() -> None:
    example = one({"prompt": "say a", "completion": "aaa", "answer": 3})
    assert text(example.prompt_ids) == "say a"
    assert text(example.demonstration_ids) == "aaa<eos>"
    assert example.demonstration == "aaa"
    assert example.columns == {"answer": 3}
    assert example.row == 7


def test_an_end_token_in_the_text_is_not_doubled() -> None:
    assert (
        one({"prompt": "a", "completion": "b<eos>"}).demonstration_ids
        == one({"prompt": "a", "completion": "b"}).demonstration_ids
    )


def test_chat_prompt_with_template_and_its_arguments() -> None:
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "yo"}],
    }
    example = one(row, TEMPLATE)
    assert text(example.prompt_ids) == "<turn>uhi<eos>\n<turn>a"
    assert text(example.demonstration_ids) == "yo<eos>", "text after the end token is removed"
    thinking_off = one(row, TEMPLATE, chat_template_kwargs={"thinking": False})
    assert text(thinking_off.prompt_ids) == "<turn>uhi<eos>\n<turn>a,,"
    assert text(thinking_off.demonstration_ids) == "yo<eos>"


def test_messages_equal_prompt_and_completion() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    whole = one({"messages": turns}, TEMPLATE)
    split = one({"prompt": turns[:1], "completion": turns[1:]}, TEMPLATE)
    assert (whole.prompt_ids, whole.demonstration_ids) == (split.prompt_ids, split.demonstration_ids)
    assert one({"messages": turns[:1]}, TEMPLATE).demonstration_ids is None


def test_prompt_format_chat_and_system_prompt() -> None:
    example = one({"prompt": "hi", "completion": "yo"}, TEMPLATE, prompt_format="chat", system_prompt="be")
    assert text(example.prompt_ids) == "<turn>sbe<eos>\n<turn>uhi<eos>\n<turn>a"
    assert text(example.demonstration_ids) == "yo<eos>"
    assert example.prompt == "hi", "reward functions get the prompt from the data"
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert text(one({"prompt": own}, TEMPLATE, system_prompt="be").prompt_ids).startswith("<turn>smine")


def test_preferences() -> None:
    """TRL's two formats: an explicit prompt, and conversations that share their beginning."""
    example = one({"prompt": "say a", "chosen": "aaa", "rejected": "bb", "score": 3})
    assert (text(example.demonstration_ids), text(example.rejected_ids)) == ("aaa<eos>", "bb<eos>")
    assert example.demonstration == "aaa"
    user, good, bad = (
        {"role": role, "content": content}
        for role, content in (("user", "hi"), ("assistant", "yo"), ("assistant", "no"))
    )
    explicit = one({"prompt": [user], "chosen": [good], "rejected": [bad]}, TEMPLATE)
    implicit = one({"chosen": [user, good], "rejected": [user, bad]}, TEMPLATE)
    for chat in (explicit, implicit):
        assert chat.prompt_ids == one({"prompt": [user]}, TEMPLATE).prompt_ids
        assert (
            chat.demonstration_ids == one({"prompt": [user], "completion": "yo"}, TEMPLATE).demonstration_ids
        )
        assert chat.rejected_ids == one({"prompt": [user], "completion": "no"}, TEMPLATE).demonstration_ids
    # UltraFeedback's form: the prompt as text, next to whole conversations.
    mixed = {"prompt": "hi", "chosen": [user, good], "rejected": [user, bad]}
    assert one(mixed).demonstration_ids == one({"prompt": "hi", "completion": "yo"}).demonstration_ids
    as_chat = one(mixed, TEMPLATE, prompt_format="chat")
    assert (as_chat.prompt_ids, as_chat.rejected_ids) == (explicit.prompt_ids, explicit.rejected_ids)
    assert one({"prompt": "a", "completion": "x", "rejected": "y"}).rejected_ids is not None
    assert one({"prompt": "a", "completion": "x"}).rejected_ids is None


def test_columns_are_renamed() -> None:
    example = one(
        {"question": "hi", "solution": "yo"}, columns={"question": "prompt", "solution": "completion"}
    )
    assert text(example.demonstration_ids) == "yo<eos>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "hi"}, r"row 7: no 'prompt'.*question.*data.columns"),
        ({"prompt": ""}, "row 7: the prompt is empty"),
        ({"prompt": "a", "completion": ""}, "row 7: the demonstration is empty"),
        ({"prompt": "a", "completion": " \n"}, "row 7: the demonstration is empty"),
        ({"prompt": "a", "completion": "<eos>"}, "row 7: the demonstration is empty"),
        ({"prompt": 3}, "row 7: 'prompt' must be a string or a list of messages"),
        ({"prompt": []}, "row 7: 'prompt' must be"),
        ({"prompt": [{"role": "user"}]}, "row 7: 'prompt' must be"),
        ({"prompt": "a", "completion": 5}, "row 7: 'completion' must be"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "x"}]}, "row 7: 'completion' must be"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "row 7: 'messages' has a completion but no prompt",
        ),
        (["a"], "row 7: expected a mapping"),
        ({"prompt": "a", "completion": "x", "chosen": "y"}, "row 7: both 'completion' and 'chosen'"),
        ({"prompt": "a", "rejected": "y"}, "row 7: 'rejected' needs 'chosen'"),
        ({"prompt": "a", "chosen": ""}, "row 7: the demonstration is empty"),
        ({"prompt": "a", "chosen": "x", "rejected": 3}, "row 7: 'rejected' must be"),
        ({"chosen": "x", "rejected": "y"}, "row 7: no 'prompt'"),
    ],
)
def test_bad_rows_are_refused_by_number(row: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        one(row)


def test_chat_needs_a_template_that_keeps_its_prompt() -> None:
    chat = {"prompt": [{"role": "user", "content": "hi"}], "completion": "yo"}
    with pytest.raises(UsageError, match="row 7: a chat needs a chat template"):
        one(chat)
    forgetful = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(UsageError, match="row 7: the chat template renders the prompt differently"):
        one(chat, forgetful)
    with pytest.raises(UsageError, match=r"row 7: the chat template raised an error: .*no system"):
        one(chat, "{{ raise_exception('no system') }}")


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end token"):
        tokenize_rows([(1, {"prompt": "a"})], tokenizer, DataConfig())


def test_long_rows_are_left_out_and_listed() -> None:
    rows = [(1, {"prompt": "a" * 9}), (2, {"prompt": "a", "completion": "b" * 9}), (3, {"prompt": "ab"})]
    tokenizer = make_tokenizer()
    dataset = tokenize_rows(rows, tokenizer, DataConfig(max_prompt_length=8, max_demonstration_length=8))
    assert [example.row for example in dataset.examples] == [3]
    assert dataset.left_out == {"prompt longer than 8 tokens": (1,), "demonstration too long": (2,)}
    disliked = (4, {"prompt": "a", "chosen": "b", "rejected": "c" * 9})
    kept = tokenize_rows([*rows[2:], disliked], tokenizer, DataConfig(max_demonstration_length=8))
    assert kept.left_out == {"rejected completion too long": (4,)}
    windowed = tokenize_rows(rows, tokenizer, DataConfig(), context_length=10, max_completion_length=2)
    assert [example.row for example in windowed.examples] == [3]
    with pytest.raises(UsageError, match="no usable row: prompt longer than 1 tokens: 1 rows"):
        tokenize_rows(rows[2:], tokenizer, DataConfig(max_prompt_length=1))


def test_files_of_every_kind_hold_the_same_rows(tmp_path: Path) -> None:
    import pandas

    rows = [{"prompt": "a", "n": "1"}, {"prompt": "b", "n": "2"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    pandas.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        read = read_rows(DataConfig(path=str(tmp_path / f"x.{kind}")))
        assert [dict(row) for _, row in read] == rows, kind
    assert [number for number, _ in read_rows(DataConfig(path=str(tmp_path / "x.jsonl")))] == [1, 3]


def test_text_in_a_csv_file_stays_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("question,completion,limit\n7,11,100\n8,,200\n")
    rows = read_rows(DataConfig(path=str(tmp_path / "x.csv"), columns={"question": "prompt"}))
    assert [dict(row) for _, row in rows] == [
        {"question": "7", "completion": "11", "limit": "100"},
        {"question": "8", "completion": None, "limit": "200"},
    ]


def test_an_answer_that_leaves_no_room_for_a_prompt_is_named() -> None:
    limits = {"context_length": 64, "max_completion_length": 64}
    with pytest.raises(UsageError, match=r"max_completion_length 64 leaves no room.* context of 64 tokens"):
        tokenize_rows([(1, {"prompt": "a"})], make_tokenizer(), DataConfig(), **limits)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: invalid JSON"),
        ("x.jsonl", b'{"prompt": "\xff"}', "invalid UTF-8"),
        ("x.json", b'{"a":\n1}', "expected a list of rows"),
        ("x.json", b"[", "invalid JSON"),
        ("x.parquet", b"nonsense", "cannot load"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_rows(DataConfig(path=str(tmp_path / name)))


def test_missing_data_is_refused() -> None:
    with pytest.raises(UsageError, match=r"file not found: 'nowhere\.jsonl'"):
        read_rows(DataConfig(path="nowhere.jsonl"))
    with pytest.raises(UsageError, match=r"set data\.path"):
        read_rows(DataConfig())


def examples(count: int) -> list[Example]:
    rows = [(n, {"prompt": "a", "completion": "b"} if n % 2 else {"prompt": "a"}) for n in range(count)]
    return list(tokenize_rows(rows, make_tokenizer(), DataConfig()).examples)


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    stream = Stream(examples(10), seed=0, name="prompts")
    first, second = [e.row for e in stream.take(10)], [e.row for e in stream.take(10)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert stream.epoch == 2


def test_a_stream_goes_on_from_its_position() -> None:
    whole = [e.row for e in Stream(examples(7), seed=3, name="prompts").take(30)]
    stream = Stream(examples(7), seed=3, name="prompts")
    taken = [e.row for size in (1, 5, 7, 4) for e in stream.take(size)]
    resumed = Stream(examples(7), seed=3, name="prompts", position=stream.position)
    assert taken + [e.row for e in resumed.take(13)] == whole


def test_the_two_streams_have_their_own_shuffles() -> None:
    one_, other = (
        [e.row for e in Stream(examples(20), seed=0, name=name).take(20)]
        for name in ("prompts", "demonstrations")
    )
    assert one_ != other


def test_a_row_s_columns_decide_what_it_teaches() -> None:
    dataset = Dataset(examples=tuple(examples(6)))
    prompts, demonstrations = split_streams(dataset, can_be_rewarded=lambda e: e.row == 0, compares=False)
    assert [e.row for e in prompts] == [0]
    assert [e.row for e in demonstrations] == [1, 3, 5]
    prompts, _ = split_streams(dataset, can_be_rewarded=lambda e: e.row == 0, compares=True)
    assert [e.row for e in prompts] == [0, 1, 3, 5]
