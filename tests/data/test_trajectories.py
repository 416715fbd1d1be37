"""Demonstrations of several turns, with results of tools between them."""

import copy
import itertools
import json
import re
from typing import Any

import pytest

from support.templates import FAMILIES, family
from uniapl.config import DataConfig
from uniapl.data.rows import tokenize_row, tokenize_rows
from uniapl.errors import UsageError
from uniapl.types import Example

USER = {"role": "user", "content": "sum?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 31, "b": 57}}}],
}
RESULT = {"role": "tool", "name": "add", "content": "88q"}
ANSWER = {"role": "assistant", "content": "itisz"}
NUMBER = {"type": "integer", "description": "a number"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": NUMBER, "b": NUMBER},
                "required": ["a", "b"],
            },
        },
    }
]
WITHOUT_TOOLS = {
    **dict.fromkeys(("gemma3", "phi3", "cohere2"), "raised an error|does not render"),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3", "smolvlm"), "does not render"),
}
"""Families whose template has no tools, and why their rows are refused."""


def one(row: dict[str, Any], tokenizer: Any = None, **config: Any) -> Example:
    return tokenize_row(1, row, tokenizer or family("qwen2_5"), DataConfig(**config))


def texts(example: Example, tokenizer: Any) -> list[str]:
    """The written and the given parts of a demonstration in turn, decoded; a written one first."""
    tokens = example.demonstration_tokens
    assert tokens is not None
    bounds = [0, *(place for part in tokens.given for place in part), len(tokens.completion)]
    parts = [tokens.completion[a:b] for a, b in itertools.pairwise(bounds)]
    written = [own for own, part in zip(([True, False] * len(parts)), parts, strict=False) for _ in part]
    assert written == tokens.is_written
    assert tokens.num_written == sum(written)
    return [str(tokenizer.decode(list(part))) for part in parts]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_written_parts_are_the_turns(name: str) -> None:
    """The whole is the template's rendering, up to an end token that the template leaves out."""
    tokenizer: Any = family(name)
    row = {"messages": [USER, CALL, RESULT, CALL, RESULT, ANSWER], "tools": TOOLS}
    if name in WITHOUT_TOOLS:
        with pytest.raises(UsageError, match=WITHOUT_TOOLS[name]):
            one(row, tokenizer)
        return
    example = one(row, tokenizer)
    call, result, again, same, answer = texts(example, tokenizer)
    assert (call, result) == (again, same)
    assert all(text in call for text in ("add", "31", "57"))
    assert "88q" in result
    header = r"(<think>)?\s*</think>|<\|channel\|>final<\|message\|>"
    assert re.sub(header, "", answer).strip() == "itisz" + FAMILIES[name]
    mine = str(tokenizer.decode([*example.prompt_ids, *(example.demonstration_ids or ())]))
    whole = tokenizer.apply_chat_template(row["messages"], tools=TOOLS, tokenize=False)
    end = FAMILIES[name]

    def plain(text: str) -> str:
        return re.sub(rf"<think>\s*</think>|\s|{re.escape(end)}", "", text)

    assert plain(mine) == plain(whole)


def test_the_prompt_ends_with_the_user_and_is_the_sampler_s() -> None:
    tokenizer: Any = family("qwen2_5")
    example = one({"messages": [USER, CALL, RESULT, ANSWER], "tools": TOOLS}, tokenizer)
    start = tokenizer.apply_chat_template([USER], tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(list(example.prompt_ids)) == start
    assert example.prompt == [USER]
    assert example.earlier_turns == ()


def test_the_boundary_of_prompt_and_completion_is_the_row_s() -> None:
    tokenizer: Any = family("qwen2_5")
    trajectory = one({"prompt": [USER], "completion": [CALL, RESULT, ANSWER], "tools": TOOLS}, tokenizer)
    whole = one({"messages": [USER, CALL, RESULT, ANSWER], "tools": TOOLS}, tokenizer)
    assert trajectory.demonstration_tokens == whole.demonstration_tokens
    last = one({"prompt": [USER, CALL, RESULT], "completion": [ANSWER], "tools": TOOLS}, tokenizer)
    assert last.demonstration_given == ()
    assert tokenizer.decode(list(last.demonstration_ids or ())) == "itisz<|im_end|>"
    text = one(
        {"prompt": "sum?", "completion": [CALL, RESULT, ANSWER], "tools": TOOLS},
        tokenizer,
        prompt_format="chat",
    )
    assert text.demonstration_tokens == whole.demonstration_tokens


def test_earlier_conversations_are_turns_of_their_own() -> None:
    """A trajectory begins after the last message of the user."""
    tokenizer: Any = family("qwen2_5")
    messages = [USER, CALL, RESULT, {"role": "assistant", "content": "first"}, USER, CALL, RESULT, ANSWER]
    example = one({"messages": messages, "tools": TOOLS}, tokenizer, train_on="all")
    assert len(example.earlier_turns) == 2
    assert len(example.demonstration_given) == 1
    assert "first<|im_end|>" in tokenizer.decode(list(example.prompt_ids))


def test_a_turn_without_weight_is_given() -> None:
    tokenizer: Any = family("qwen2_5")
    wrong = {**copy.deepcopy(CALL), "weight": 0}
    example = one({"messages": [USER, wrong, RESULT, CALL, RESULT, ANSWER], "tools": TOOLS}, tokenizer)
    whole = one({"messages": [USER, CALL, RESULT, CALL, RESULT, ANSWER], "tools": TOOLS}, tokenizer)
    assert example.demonstration_ids == whole.demonstration_ids
    first, second = whole.demonstration_given
    assert example.demonstration_given == ((0, first[0]), first, second)
    later = one({"messages": [USER, CALL, RESULT, wrong, RESULT, ANSWER], "tools": TOOLS}, tokenizer)
    assert later.demonstration_given == ((first[0], second[0]), second)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (
            [USER, ANSWER, RESULT, ANSWER],
            "a result of a tool follows an assistant message without 'tool_calls'",
        ),
        ([USER, {**CALL, "weight": 0}, RESULT, {**ANSWER, "weight": 0}], None),
    ],
)
def test_wrong_trajectories(messages: list[dict[str, Any]], error: str | None) -> None:
    row = {"messages": messages, "tools": TOOLS}
    if error is None:
        assert one(row).demonstration_ids is None, "no turn is trained"
        return
    with pytest.raises(UsageError, match=error):
        one(row)


def test_what_rollouts_ignore_of_a_row_is_noted() -> None:
    """Prompts have the row's own tools and arguments; rollouts call the run's."""
    tokenizer: Any = family("qwen3")
    other = copy.deepcopy(TOOLS)
    other[0]["function"]["name"] = "sub"

    def notes(**columns: Any) -> list[str]:
        noted: dict[str, list[int]] = {}
        tokenize_row(1, {"messages": [USER, ANSWER], **columns}, tokenizer, DataConfig(), (), noted, TOOLS)
        return [*noted]

    usual = notes()
    assert notes(tools=TOOLS) == notes(tools=json.dumps(TOOLS)) == usual
    (note,) = {*notes(tools=other)} - {*usual}
    assert "the prompt shows the functions of the column 'tools' (sub), but rollouts can call" in note
    (note,) = {*notes(tools=[])} - {*usual}
    assert "'tools' (none)" in note
    (note,) = {*notes(chat_template_kwargs={"enable_thinking": False})} - {*usual}
    assert "'chat_template_kwargs' does not apply to results of tools in rollouts" in note


QUESTION = [{"role": "user", "content": "sum?"}]
SUM_CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [SUM_CALL]}
ANSWERED = {"role": "assistant", "content": "1"}


def test_a_call_without_a_result_is_refused() -> None:
    messages = [*QUESTION, CALLED, ANSWERED]
    with pytest.raises(UsageError, match=r"message 2 calls tools, and no result follows it: add a message"):
        one({"messages": messages})


def test_demonstrations_that_call_unknown_tools_are_noted() -> None:
    schema = {"type": "function", "function": {"name": "other", "description": "", "parameters": {}}}
    messages = [*QUESTION, CALLED, {"role": "tool", "content": "1"}, ANSWERED]
    known = {**schema, "function": {**schema["function"], "name": "sum"}}
    found = [
        tokenize_rows([(1, {"messages": messages})], family("qwen2_5"), DataConfig(), tools=tools).notes
        for tools in ([schema], [known])
    ]
    assert "demonstrations call sum, which the policy cannot: rollout.tools and" in str(found[0])
    assert "demonstrations call" not in str(found[1])
    with pytest.raises(UsageError, match=r"\(columns: x\)"):
        tokenize_rows([(1, {"x": 1})], family("qwen2_5"), DataConfig(), tools=[schema])
    for odd in (5, [5], [{"tool_calls": 5}], [{"role": "user", "tool_calls": [5]}]):
        with pytest.raises(UsageError):
            tokenize_rows([(1, {"messages": odd})], family("qwen2_5"), DataConfig(), tools=[schema])
