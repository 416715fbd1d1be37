"""Which turns of a conversation are trained."""

from typing import Any

import pytest

from support.templates import byte_tokenizer, template
from support.tiny import make_tokenizer
from uniapl.config import DataConfig
from uniapl.data.rows import Dataset, tokenize_rows
from uniapl.data.streams import split_streams
from uniapl.errors import UsageError
from uniapl.types import Example

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>a{% endif %}"
)


def turn(text: str, **keys: Any) -> dict[str, Any]:
    """u... or a..., the rest is the content."""
    return {"role": {"u": "user", "a": "assistant", "s": "system"}[text[0]], "content": text[1:], **keys}


def one(row: dict[str, Any], **config: Any) -> Example:
    return tokenize_rows([(7, row)], make_tokenizer(chat_template=TEMPLATE), DataConfig(**config)).examples[0]


def turns(example: Example) -> list[tuple[str, str]]:
    decode = make_tokenizer().decode
    return [(str(decode(list(p))), str(decode(list(c)))) for p, c, _ in example.demonstrated_turns]


CHAT = [turn("uhi"), turn("ayo"), turn("uwhy"), turn("aso")]
FIRST = ("<turn>uhi<eos><turn>a", "yo<eos>")
LAST = ("<turn>uhi<eos><turn>ayo<eos><turn>uwhy<eos><turn>a", "so<eos>")


@pytest.mark.case(19)
def test_the_last_or_all_assistant_turns_are_trained() -> None:
    last, everything = one({"messages": CHAT}), one({"messages": CHAT}, train_on="all")
    assert turns(last) == [LAST]
    assert turns(everything) == [FIRST, LAST]
    # Rollouts and the discriminator see the same in both cases.
    assert (everything.prompt_ids, everything.demonstration_ids) == (last.prompt_ids, last.demonstration_ids)
    assert everything.prompt == last.prompt == CHAT[:-1]
    assert everything.demonstration == "so"


def test_a_system_prompt_shifts_no_turn() -> None:
    example = one({"messages": CHAT}, train_on="all", system_prompt="be")
    assert turns(example) == [("<turn>sbe<eos>" + prompt, text) for prompt, text in (FIRST, LAST)]


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0.0}])
def test_a_turn_that_is_marked_is_not_trained(key: dict[str, Any]) -> None:
    first_off = [turn("uhi"), turn("ayo", **key), *CHAT[2:]]
    assert turns(one({"messages": first_off}, train_on="all")) == [LAST]
    assert turns(one({"messages": first_off})) == [LAST]
    last_off = [*CHAT[:3], turn("aso", **key)]
    example = one({"messages": last_off}, train_on="all")
    assert turns(example) == [FIRST]
    assert example.demonstration_ids is None
    assert example.prompt == CHAT[:-1], "the prompt stays a prompt for rollouts"
    assert turns(one({"messages": last_off})) == []
    assert turns(one({"prompt": CHAT[:1], "completion": [turn("ayo", **key)]})) == []
    assert turns(one({"prompt": "hi", "completion": [turn("ayo", **key)]})) == []
    on = dict.fromkeys(key, 1)
    assert turns(one({"messages": [*CHAT[:3], turn("aso", **on)]})) == [LAST]
    marked = [turn("uhi", **key), turn("ayo", **on), *CHAT[2:]]
    assert turns(one({"messages": marked}, train_on="all")) == [FIRST, LAST]


def test_demonstrations_without_a_last_one_are_in_their_stream() -> None:
    row = {"messages": [*CHAT[:3], turn("aso", weight=0)]}
    examples = (one(row), one(row, train_on="all"))
    prompts, demonstrations = split_streams(
        Dataset(examples=examples), can_be_rewarded=lambda _: False, compares=True
    )
    assert prompts == [], "the discriminator compares with the last turn only"
    assert demonstrations == [examples[1]]


def test_all_turns_of_a_conversation_without_an_answer_at_its_end() -> None:
    example = one({"messages": CHAT[:3]}, train_on="all")
    assert turns(example) == [FIRST]
    assert example.demonstration is None
    assert turns(one({"messages": CHAT[:3]})) == []


def test_only_the_completion_is_trained() -> None:
    row = {"prompt": CHAT[:2], "completion": [turn("uwhy"), turn("aso")]}
    assert turns(one(row, train_on="all")) == [LAST]
    assert turns(one({"prompt": CHAT[:1], "completion": CHAT[1:]}, train_on="all")) == [FIRST, LAST]
    marked = {"prompt": [turn("uhi"), turn("ayo", weight=1), turn("uwhy")], "completion": "so"}
    assert turns(one(marked, train_on="all")) == [FIRST, LAST]
    with pytest.raises(
        UsageError, match=r"row 7: 'completion' has 2 assistant messages; set data.train_on: all"
    ):
        one({"prompt": CHAT[:1], "completion": CHAT[1:]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("uhi"), turn("ayo", weight=1), *CHAT[2:]]}, "message 2 .*set it to all"),
        ({"messages": [turn("uhi", train=True), turn("ayo")]}, "message 1 .*only assistant"),
        ({"messages": [turn("uhi"), turn("ayo", weight=0.5)]}, "message 2: .* must be 0 or 1"),
        ({"messages": [turn("uhi"), turn("ayo", weight=0, train=True)]}, "message 2: .* must be 0 or 1"),
        ({"messages": [turn("uhi"), turn("ayo"), turn("aso")]}, "messages 2 and 3 are both the assistant's"),
        ({"prompt": CHAT[:2], "completion": [turn("aso"), turn("uwhy"), turn("ano")]}, "only one message"),
    ],
)
def test_contradictions_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"row 7: .*{message}"):
        one(row)


def test_a_greeting_is_not_trained() -> None:
    greeting = [turn("ahi"), *CHAT[:2]]
    with pytest.raises(UsageError, match="row 7: message 1 is an assistant message without a prompt"):
        one({"messages": greeting}, train_on="all")
    assert turns(one({"messages": greeting})) == [("<turn>ahi<eos><turn>uhi<eos><turn>a", "yo<eos>")]
    greeting[0] = turn("ahi", weight=0)
    assert len(turns(one({"messages": greeting}, train_on="all"))) == 1


def test_an_empty_earlier_turn_is_refused() -> None:
    with pytest.raises(UsageError, match="row 7: the demonstration is empty"):
        one({"messages": [turn("uhi"), turn("a "), *CHAT[2:]]}, train_on="all")


def test_a_long_earlier_turn_leaves_the_row_out() -> None:
    rows = [(1, {"messages": [turn("uhi"), turn("a" + "y" * 9), *CHAT[2:]]}), (2, {"messages": CHAT})]
    config = DataConfig(train_on="all", max_demonstration_length=8)
    data = tokenize_rows(rows, make_tokenizer(chat_template=TEMPLATE), config)
    assert data.left_out == {"demonstration too long": (1,)}


PREFIXES = ["qwen2_5", "qwen3", "llama3", "phi3", "gemma3", "cohere2", "glm4moe", "lfm2_v2"]


@pytest.mark.parametrize("name", PREFIXES)
def test_all_covers_the_tokens_of_trl_s_assistant_only_loss(name: str) -> None:
    """Except what a template writes after the end of a turn, which no rollout can contain."""
    end = "<eot>"
    source = template(f"{name}_training")
    for mark in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"):
        source = source.replace(mark, end)
    tokenizer = byte_tokenizer(source, end)
    messages = [
        turn("uWhat is 2+2?"),
        turn("aFour."),
        turn("uAnd in German, s'il te plaît?"),
        turn("aVier. 四"),
        turn("uThanks"),
        turn("aBye"),
    ]
    theirs: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    data = tokenize_rows([(1, {"messages": messages})], tokenizer, DataConfig(train_on="all"))
    ours = [0] * len(ids)
    for prompt, completion, _ in data.examples[0].demonstrated_turns:
        stop = len(prompt) + len(completion)
        assert (*prompt, *completion)[: stop - 1] == tuple(ids[: stop - 1]), "the same context"
        closed = ids[stop - 1 : stop] == [tokenizer.eos_token_id]
        ours[len(prompt) : stop - (not closed)] = [1] * (len(completion) - (not closed))
    extra = [index for index, (a, b) in enumerate(zip(ours, mask, strict=True)) if a and not b]
    missing = [index for index, (a, b) in enumerate(zip(ours, mask, strict=True)) if b and not a]
    assert not [index for index in extra if ids[index] != tokenizer.eos_token_id]
    written = tokenizer.decode([ids[index] for index in missing], skip_special_tokens=True)
    assert not str(written).strip()
