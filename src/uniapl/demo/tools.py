"""The demo task whose questions need tools: tokenizer, splits of questions, data rows."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uniapl.demo.arithmetic import (
    HELD_OUT_PEOPLE,
    OPERATIONS,
    PEOPLE,
    QUANTITIES,
    UNKNOWN,
    UNREADABLE,
    Question,
    draw_questions,
)
from uniapl.demo.language import NOUNS
from uniapl.demo.solvers import FORMS, Message, solve, written
from uniapl.types import derive_seed

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", "<tools>", "<user>", "<assistant>", "<tool>")
PIECES = (
    *(
        "what is ",
        *(f" {word} " for word in OPERATIONS),
        *(f"the {name} of the " for name in QUANTITIES),
        "?",
    ),
    *("<tool_call>", '{"name": "', "lookup", "calculate", '", "arguments": {"name": "', '", "quantity": "'),
    *('", "arguments": {"expression": "', '"}}', "}}", "</tool_call>"),
    *(*(f" {sign} " for sign in OPERATIONS.values()), "-", *"0123456789"),
    *('{"error": "', UNKNOWN, UNREADABLE, '"}', *filter(None, FORMS), *NOUNS, *QUANTITIES),
)
"""Tokens: phrases, digits, and the parts of a tool call."""
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<eos>"
    "{% else %}<{{ message.role }}>{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

Part = tuple[str, bool]
"""A part of a text, and whether it is trained."""


@dataclass(frozen=True, kw_only=True)
class ToolTask:
    """Training questions, held-out questions, and questions about people that no training question has.

    The expert's trajectories exist for all held-out questions, and for a few of the training questions.
    """

    train: tuple[Question, ...]
    demonstrations: int
    """Number of the training questions, from the first, that have the expert's trajectory."""
    held_out: tuple[Question, ...]
    held_out_people: tuple[Question, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The training questions as data rows."""
        return [as_row(one, solved=n < self.demonstrations) for n, one in enumerate(self.train)]


def make_tool_task(
    *, seed: int = 0, questions: int = 1024, demonstrations: int = 64, held_out: int = 192
) -> ToolTask:
    """Draw the task from a seed: distinct questions.

    Args:
        held_out: Questions in each held-out split.
    """
    rng, seen = random.Random(derive_seed(seed, "embedded", "questions")), set[str]()
    known = draw_questions(rng, PEOPLE, seen)
    train = tuple(islice(known, questions))
    new = zip(*(draw_questions(rng, HELD_OUT_PEOPLE, seen, facts=facts) for facts in (1, 2)), strict=True)
    return ToolTask(
        train=train,
        demonstrations=demonstrations,
        held_out=tuple(islice(known, held_out)),
        held_out_people=tuple(islice((one for pair in new for one in pair), held_out)),
    )


def as_row(question: Question, *, solved: bool) -> dict[str, Any]:
    """A data row: the question, the answer as a column and, if `solved`, the expert's trajectory."""
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": question.text}],
        "answer": question.answer,
    }
    return row | ({"completion": solve(question)} if solved else {})


def rendered(question: Question, messages: Sequence[Message]) -> list[Part]:
    """A question and a trajectory, as the chat template writes them.

    The base model is trained on these parts, because the checks of the template cost more than its training.
    """
    parts: list[Part] = [(f"<tools>lookupcalculate<user>{question.text}", False)]
    for message in messages:
        if message["role"] == "tool":
            parts.append((f"<tool>{message['content']}", False))
        else:
            parts += [("<assistant>", False), (f"{written(message)}<eos>", True)]
    return parts


def make_tool_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per phrase, digit or part of a tool call, and a chat template with tools."""
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *PIECES)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    longest_first = sorted(PIECES, key=len, reverse=True)
    pattern = Regex("|".join(map(re.escape, longest_first)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=[*SPECIAL_TOKENS[3:]],
        chat_template=CHAT_TEMPLATE,
    )
