"""Random conversations with the chat templates of model families: every text reaches the model or the row is
refused, the trained tokens are exactly the assistant's, and sampling continues where the prompt ends."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from support.fuzzing import tries
from support.templates import FAMILIES, family
from uniapl.config import DataConfig
from uniapl.data.rows import tokenize_row
from uniapl.errors import UsageError
from uniapl.types import TokenIds, Tokens

TOKENIZERS = {name: family(name) for name in FAMILIES}
STRIPS_THOUGHTS = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano")
"""Their prompts begin a thought that their rendering of the answer does not contain."""
REFUSALS = (
    r"is not in what the chat template renders|does not render '\w+' of 'tools'|removes a part of the"
    r"|the chat template raised an error|renders the prompt differently|writes the list of content parts"
)

letters = st.text(
    st.sampled_from("abcXYZ .,:-!?019äßéñŁжшλアあ漢字한글שלוםمرحبا👧🏽\u0301")  # noqa: RUF001
    | st.sampled_from("\"'{}<>/\\\n"),
    min_size=1,
    max_size=12,
)
"""Words of many languages and what JSON and HTML escape."""


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row with `messages`. Every text has a number of its own, so that it can be found."""
    count = 0

    def text() -> str:
        nonlocal count
        count += 1
        # White space at both ends is the template's to keep or strip.
        return f"{draw(letters)}q{count}z{draw(letters)}".strip()

    def message(role: str, **more: Any) -> dict[str, Any]:
        content: Any = text()
        if role == "assistant" and draw(st.integers(0, 3)) == 0:
            content = f"<think>\n{text()}\n</think>\n\n{content}"
        if draw(st.integers(0, 4)) == 0:
            middle = draw(st.integers(0, len(content)))
            content = [{"type": "text", "text": part} for part in (content[:middle], content[middle:])]
        return {"role": role, "content": content, **more}

    row: dict[str, Any] = {"messages": []}
    messages = row["messages"]
    first = draw(st.sampled_from(["", "", "system", "system", "developer"]))
    if first:
        messages.append(message(first))
    for number in range(draw(st.integers(1, 3))):
        messages.append(message("user"))
        if draw(st.integers(0, 4)) == 0:
            name, arguments = f"f{number}n", {f"k{number}y": text()}
            function = {
                "name": name,
                "arguments": arguments if draw(st.booleans()) else json.dumps(arguments),
            }
            call = {"id": "abcdefgh1", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append(message("tool", name=name, tool_call_id="abcdefgh1"))
            parameters = {
                "type": "object",
                "properties": {f"k{number}y": {"type": "string", "description": "d"}},
            }
            tool = {"name": name, "description": text(), "parameters": parameters}
            row.setdefault("tools", []).append({"type": "function", "function": tool})
        messages.append(message("assistant"))
    return row


def joined(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def numbers(text: str) -> set[str]:
    return set(re.findall(r"q\d+z", text))


def occurs(text: str, whole: str) -> bool:
    return text.strip() in whole or json.dumps(text.strip(), ensure_ascii=False)[1:-1] in whole


def answer(message: dict[str, Any]) -> str:
    return joined(message).rpartition("</think>")[2]


def written_parts(tokens: Tokens) -> list[tuple[TokenIds, TokenIds]]:
    """Each turn of a trajectory with all that precedes it."""
    bounds = [0, *(place for part in tokens.given for place in part), len(tokens.completion)]
    starts = zip(bounds[::2], bounds[1::2], strict=True)
    return [(tokens.prompt + tokens.completion[:a], tokens.completion[a:b]) for a, b in starts]


@pytest.mark.parametrize("name", FAMILIES)
@tries(25)
@given(row=conversations())
def test_random_conversations(name: str, row: dict[str, Any]) -> None:
    tokenizer, messages = TOKENIZERS[name], row["messages"]
    refusal, example = "", None
    try:
        example = tokenize_row(1, row, tokenizer, DataConfig(train_on="all"))
    except UsageError as error:
        refusal = str(error)
    if example is None:
        assert re.fullmatch(rf"row 1: .*({REFUSALS}).*", refusal, re.DOTALL)
        roles = {message["role"] for message in messages}
        assert roles & {"tool", "developer", "system"}, "a conversation of user and assistant is accepted"
        return
    parts = [part for tokens in example.demonstrated_turns for part in written_parts(tokens)]
    turns = [(decoded(tokenizer, p), decoded(tokenizer, c)) for p, c in parts]
    whole = "".join(turns[-1])
    for message in messages:
        assert occurs(answer(message), whole), "every text reaches the model"
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            assert all(occurs(value, whole) for value in arguments.values())
    for tool in row.get("tools", ()):
        assert occurs(tool["function"]["name"], whole)
        assert occurs(tool["function"]["description"], whole)
    trained = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(turns) == len(trained), "all of them are trained"
    for index, (prompt, completion), (_, ids) in zip(trained, turns, parts, strict=True):
        message, before = messages[index], messages[:index]
        own = numbers(joined(message) + json.dumps(message.get("tool_calls", ""), ensure_ascii=False))
        assert numbers(completion) == own, "exactly the assistant's text is trained, with its thought"
        assert not numbers(prompt) & own
        assert all(numbers(answer(earlier)) <= numbers(prompt) for earlier in before)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
        given_ = [{**earlier, "content": joined(earlier)} for earlier in before]
        if any("tool_calls" in earlier for earlier in before):
            continue
        if name == "smolvlm":
            given_ = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in given_]
        start: Any = tokenizer.apply_chat_template(
            given_, tools=row.get("tools"), tokenize=False, add_generation_prompt=True
        )
        if "reasoning_content" not in str(tokenizer.chat_template):
            assert prompt == start, "sampling continues where the prompt ends"
        assert prompt.endswith(start[-12:])


@pytest.mark.parametrize("name", FAMILIES)
@tries(10)
@given(begun=letters, rest=letters, user=letters)
def test_random_answers_are_continued(name: str, begun: str, rest: str, user: str) -> None:
    """A prompt that ends inside an answer, and its demonstration, are the rendering of the whole answer."""
    tokenizer = TOKENIZERS[name]
    prompt = [
        {"role": "user", "content": f"{user}q1z"},
        {"role": "assistant", "content": f"{begun}q2z"},
    ]
    completion = f"{rest}q3z"
    example = tokenize_row(1, {"prompt": prompt, "completion": completion}, tokenizer, DataConfig())
    assert example.demonstration_ids is not None
    ended = decoded(tokenizer, example.prompt_ids)
    assert ended.endswith(f"{begun}q2z".strip())
    whole_turn = [{"role": "assistant", "content": f"{begun}q2z{completion}"}]
    whole = tokenize_row(1, {"prompt": prompt[:1], "completion": whole_turn}, tokenizer, DataConfig())
    both = decoded(tokenizer, [*example.prompt_ids, *example.demonstration_ids])
    if name not in STRIPS_THOUGHTS:
        assert both == decoded(tokenizer, [*whole.prompt_ids, *(whole.demonstration_ids or ())])
    assert both.removesuffix(FAMILIES[name]).endswith(f"q2z{completion}".rstrip()) or occurs(completion, both)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_conversation_is_accepted_by_every_family(name: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    example = tokenize_row(1, {"messages": messages}, TOKENIZERS[name], DataConfig(train_on="all"))
    assert len(example.demonstrated_turns) == 2
