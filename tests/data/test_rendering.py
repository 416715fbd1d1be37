"""What reaches the model of a conversation, with the chat templates of model families."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from support.templates import FAMILIES, byte_tokenizer, family, template
from uniapl.config import DataConfig
from uniapl.data.rows import Dataset, tokenize_rows
from uniapl.errors import UsageError
from uniapl.types import Example

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Name a prime."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name."}}},
    },
}
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": "3 degrees"}


def dataset(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **config: Any) -> Dataset:
    return tokenize_rows([(7, row)], tokenizer, DataConfig(**config))


def texts(name: str, row: dict[str, Any], **config: Any) -> tuple[str, str]:
    """Prompt and demonstration as the model reads them."""
    tokenizer = family(name)
    return decoded(tokenizer, dataset(tokenizer, row, **config).examples[0])


def decoded(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[str, str]:
    prompt, answer = (
        tokenizer.decode(list(ids or ())) for ids in (example.prompt_ids, example.demonstration_ids)
    )
    return str(prompt), str(answer)


@pytest.mark.case(6)
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "deepseek_r1_distill", "glm4moe", "cohere2", "phi3"])
def test_a_role_that_the_template_ignores_is_refused(name: str) -> None:
    prompt = [{"role": "developer", "content": "Answer in French."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(
        UsageError, match=r"row 7: message 1 \(role 'developer'\): 'Answer in French.' is not"
    ):
        dataset(family(name), {"prompt": prompt})


def test_a_text_that_occurs_elsewhere_does_not_hide_a_lost_one() -> None:
    prompt = [{"role": "developer", "content": "Hi"}, {"role": "user", "content": "Hi"}]
    with pytest.raises(UsageError, match="message 1"):
        dataset(family("qwen3"), {"prompt": prompt})
    with pytest.raises(UsageError, match="message 1"):
        dataset(byte_tokenizer(CHATML.replace("m.content", "m.content|upper")), {"prompt": [USER]})
    with pytest.raises(UsageError, match="message 1"):
        dataset(byte_tokenizer(CHATML.replace("m.content", "m.content[:4]")), {"prompt": [USER]})


@pytest.mark.case(7)
@pytest.mark.parametrize("name", [*FAMILIES, "chatml"])
def test_text_parts_are_joined(name: str) -> None:
    tokenizer = byte_tokenizer(CHATML) if name == "chatml" else family(name)
    parts = [{"type": "text", "text": "Name ", "image": None}, {"type": "text", "text": "a prime."}]
    joined = dataset(tokenizer, {"prompt": [USER], "completion": "7"}).examples[0]
    split = dataset(tokenizer, {"prompt": [{**USER, "content": parts}], "completion": "7"}).examples[0]
    assert (split.prompt_ids, split.demonstration_ids) == (joined.prompt_ids, joined.demonstration_ids)
    assert "Name a prime." in decoded(tokenizer, split)[0]
    assert split.prompt == [USER], "reward functions get text"


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, 3]
)
def test_other_parts_are_refused_by_name(part: Any) -> None:
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
    kind = part["type"] if isinstance(part, dict) else part
    words = "a part of type 'text' has no 'text'" if kind == "text" else f"content of type {kind!r}"
    with pytest.raises(UsageError, match=f"row 7: 'prompt', message 1: {words}"):
        dataset(family("qwen3"), row)


@pytest.mark.case(8)
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe", "lfm2_v2", "gptoss"])
def test_tools_are_given_to_the_template(name: str) -> None:
    import json

    row = {"prompt": [USER], "completion": "7", "tools": [TOOL]}
    prompt, answer = texts(name, row)
    assert "get_weather" in prompt
    assert "Weather of a city." in prompt
    assert answer.startswith(texts(name, {**row, "tools": []})[1][:3])
    assert texts(name, {**row, "tools": json.dumps([TOOL])}) == (prompt, answer)
    bare = {"prompt": [USER], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
    assert '"name": "f"' in texts("qwen3", bare)[0]


def test_tools_that_are_not_rendered_or_not_tools_are_refused() -> None:
    with pytest.raises(UsageError, match="row 7: the chat template does not render 'get_weather' of 'tools'"):
        dataset(family("phi3"), {"prompt": [USER], "tools": [TOOL]})
    with pytest.raises(UsageError, match="row 7: the chat template does not render 'get_weather' of 'tools'"):
        # It renders the call of that name, but not the tool.
        dataset(family("deepseekv3"), {"prompt": [USER, CALL, RESULT], "tools": [TOOL]})
    with pytest.raises(UsageError, match="row 7: 'tools' must be a list of JSON schemas"):
        dataset(family("qwen3"), {"prompt": [USER], "tools": [{"type": "function"}]})
    with pytest.raises(UsageError, match="row 7: 'tools' is text but not JSON"):
        dataset(family("qwen3"), {"prompt": [USER], "tools": "a hammer"})
    plain = dataset(family("qwen3"), {"prompt": "text", "tools": "a hammer"})
    assert plain.notes == ("row 7: tools has no effect on a plain text prompt; set data.prompt_format: chat",)


@pytest.mark.case(9)
def test_template_arguments_of_a_row_precede_the_configured_ones() -> None:
    row = {"prompt": [USER], "completion": "7"}
    on = texts("qwen3", row)
    off = texts("qwen3", row, chat_template_kwargs={"enable_thinking": False})
    assert off[0] == on[0] + "<think>\n\n</think>\n\n"
    assert texts("qwen3", row | {"chat_template_kwargs": {"enable_thinking": False}}) == off
    mixed = row | {"chat_template_kwargs": '{"enable_thinking": true}'}
    assert texts("qwen3", mixed, chat_template_kwargs={"enable_thinking": False}) == on
    for bad in ({"tokenize": True}, {"add_generation_prompt": False}):
        with pytest.raises(UsageError, match=f"row 7: chat_template_kwargs cannot set '{next(iter(bad))}'"):
            dataset(family("qwen3"), row | {"chat_template_kwargs": bad})
    with pytest.raises(UsageError, match="row 7: 'chat_template_kwargs' must map names"):
        dataset(family("qwen3"), row | {"chat_template_kwargs": [1]})


@pytest.mark.case(19)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_ends_with_the_assistant_is_continued(name: str) -> None:
    begun = [USER, {"role": "assistant", "content": "Sure: "}]
    prompt, answer = texts(name, {"prompt": begun, "completion": "7 is prime."})
    end = FAMILIES[name]
    assert prompt.endswith(("Sure: ", "Sure:"))
    assert prompt + answer == prompt.rstrip() + " 7 is prime." + answer.partition("prime.")[2]
    assert answer.endswith(end)
    message = [{"role": "assistant", "content": "7 is prime."}]
    assert texts(name, {"prompt": begun, "completion": message}) == (prompt, answer)
    alone = family(name)
    assert decoded(alone, dataset(alone, {"prompt": begun}).examples[0]) == (prompt, "")


@pytest.mark.case(20)
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_templates_that_remove_thoughts_train_them(name: str) -> None:
    end = FAMILIES[name]
    for thought in ("<think>\n7, 9?\n</think>\n\n", "7, 9?\n</think>\n\n"):
        prompt, answer = texts(name, {"prompt": [USER], "completion": f"{thought}Seven."})
        assert prompt.endswith("<think>\n")
        assert answer == f"7, 9?\n</think>\n\nSeven.{end}"
    turn = [{"role": "assistant", "reasoning_content": "7, 9?", "content": "Seven."}]
    assert texts(name, {"prompt": [USER], "completion": turn})[1] == f"7, 9?\n</think>\n\nSeven.{end}"
    data = dataset(family(name), {"prompt": [USER], "completion": "Seven."})
    prompt, answer = decoded(family(name), data.examples[0])
    assert (prompt[-8:], answer) == ("<think>\n", f"\n</think>\n\nSeven.{end}")
    assert data.examples[0].demonstration == "Seven."
    assert "an empty thought" in data.notes[0]
    begun = [USER, {"role": "assistant", "content": "<think>\n7, "}]
    prompt, answer = texts(name, {"prompt": begun, "completion": "9?\n</think>\n\nSeven."})
    assert prompt.endswith("<think>\n7, ")
    assert answer == f"9?\n</think>\n\nSeven.{end}"


def test_a_template_without_an_opened_thought_keeps_the_thought() -> None:
    stripping = template("deepseek_r1_distill").replace("<think>\\n", "")
    tokenizer = byte_tokenizer(stripping, FAMILIES["deepseek_r1_distill"])
    row = {"prompt": [USER], "completion": "<think>\n7\n</think>\n\nSeven."}
    prompt, answer = decoded(tokenizer, dataset(tokenizer, row).examples[0])
    assert prompt.endswith("Assistant｜>")  # noqa: RUF001
    assert answer.startswith("<think>\n7\n</think>\n\nSeven.<")


@pytest.mark.parametrize("completion", ["Well. <think>\n7\n</think>\n\nSeven.", "<think>x</think>y"])
def test_a_part_of_the_demonstration_that_is_lost_is_refused(completion: str) -> None:
    off = {"enable_thinking": False} if completion.startswith("<think>") else {}
    with pytest.raises(UsageError, match=r"row 7: .*(removes a part|is not in what|renders the prompt diff)"):
        dataset(family("qwen3"), {"prompt": [USER], "completion": completion}, chat_template_kwargs=off)


def test_earlier_thoughts_may_be_removed() -> None:
    messages = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSeven."}, USER]
    prompt, _ = texts("qwen3", {"prompt": messages})
    assert "Seven." in prompt
    assert "hm" not in prompt


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'),
        ("qwen2_5", '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'),
        ("llama3_1", '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>'),
        ("lfm2_v2", "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|><|im_end|>"),
        ("deepseekv3", 'get_weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'),  # noqa: RUF001
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_tool_calls_are_trained(name: str, expected: str, as_json: bool) -> None:
    call = CALL
    if as_json:
        function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**CALL["tool_calls"][0], "function": function}],
        }
    tools = {} if name == "deepseekv3" else {"tools": [TOOL]}
    tokenizer = family(name)
    example = dataset(tokenizer, {"messages": [USER, call], **tools}).examples[0]
    answer = decoded(tokenizer, example)[1]
    assert answer.endswith(expected) or answer.removesuffix(FAMILIES[name]).endswith(expected)
    assert "get_weather" in str(example.demonstration)
    _, after = texts(
        name, {"messages": [USER, call, RESULT, {"role": "assistant", "content": "Cold."}], **tools}
    )
    assert "3 degrees" in after
    assert "Paris" in after


@pytest.mark.parametrize("name", ["phi3", "llama3_2", "smolvlm", "lfm2_v2"])
def test_a_call_is_refused_where_the_template_has_none(name: str) -> None:
    without = template(name).replace("tool_calls", "other")
    tokenizer = byte_tokenizer(without, FAMILIES[name])
    with pytest.raises(UsageError, match="row 7: "):
        dataset(tokenizer, {"messages": [USER, CALL]})


def test_a_call_that_is_lost_is_refused_although_its_tool_has_the_name() -> None:
    without = template("qwen3").replace("message.tool_calls", "message.other")
    tokenizer = byte_tokenizer(without, FAMILIES["qwen3"])
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "get_weather"}}]}
    with pytest.raises(UsageError, match=r"row 7: message 2 \(role 'assistant'\): 'get_weather' is not in"):
        dataset(tokenizer, {"prompt": [USER, call, RESULT], "tools": [TOOL]})


@pytest.mark.parametrize(
    "calls", [3, [3], [{"function": {}}], [{"function": {"name": "f", "arguments": "{"}}]]
)
def test_calls_of_another_form_are_refused(calls: Any) -> None:
    with pytest.raises(UsageError, match=r"row 7: .*(tool_calls|tool call are not JSON)"):
        dataset(family("qwen3"), {"messages": [USER, {"role": "assistant", "tool_calls": calls}]})


@pytest.mark.case(21)
@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_a_date_is_noted_and_can_be_set(name: str) -> None:
    row = {"prompt": [USER], "completion": "7"}
    (note,) = dataset(family(name), row).notes
    assert note.startswith("row 7: the chat template writes today's date")
    assert "date_string" in note
    arguments = {"date_string": "26 Jul 2024"}
    fixed = dataset(family(name), row, chat_template_kwargs=arguments)
    assert fixed.notes == ()
    assert "26 Jul 2024" in decoded(family(name), fixed.examples[0])[0]
    assert dataset(family("llama3_1"), row).notes == (), "its date is fixed"


def test_a_text_prompt_that_begins_with_bos_gets_one() -> None:
    tokenizer = byte_tokenizer(None, bos=True)
    plain = dataset(tokenizer, {"prompt": "[INST] a", "completion": "b"})
    rendered = dataset(tokenizer, {"prompt": "<s>[INST] a", "completion": "b"})
    assert plain.examples[0].prompt_ids == rendered.examples[0].prompt_ids
    assert plain.examples[0].prompt_ids[0] == 2
    assert plain.notes == ()
    assert rendered.notes == (
        "row 7: the prompt's text begins with the tokenizer's first token (BOS), so no second one is added",
    )
    without = byte_tokenizer(None)
    assert dataset(without, {"prompt": "<s>a"}).examples[0].prompt_ids[0] == 2


def test_notes_count_their_rows() -> None:
    rows = [(number, {"prompt": "<s>a"}) for number in (3, 4, 9)]
    (note,) = tokenize_rows(rows, byte_tokenizer(None, bos=True), DataConfig()).notes
    assert note.startswith("row 3 and 2 other rows: the prompt's text begins with")


def test_an_empty_thought_that_the_template_writes_is_noted() -> None:
    """Qwen3 writes it before the answer, or, with enable_thinking: false, at the end of the prompt."""
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": "yo"}
    (note,) = dataset(family("qwen3"), row).notes
    assert "an empty thought (<think></think>) before each demonstration" in note
    assert not dataset(family("qwen3"), row, chat_template_kwargs={"enable_thinking": False}).notes
    assert not dataset(family("qwen3"), row | {"completion": "<think>\nOne.\n</think>\n\nyo"}).notes
    assert not dataset(family("qwen2_5"), row).notes
