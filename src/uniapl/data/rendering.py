"""Render conversations with a chat template, and check that all of their text is in the result."""

import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from uniapl.data.conversations import Message, arguments_of, function_of
from uniapl.data.marks import (
    CALL_MARK,
    DATE_MARK,
    MARK,
    TOOL_MARK,
    leaves,
    occurs,
    with_marked_name,
    with_marks,
)
from uniapl.errors import UsageError

CLOCK = "strftime_now"
"""The function with which templates read the clock."""
THOUGHT = re.compile(r"(?:<think>|\A)(?:(?!<think>).)*?</think>", re.DOTALL)
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thought; transformers treats them as one."""
RESERVED = {"conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message"}
DATE_NOTE = (
    "the chat template writes today's date, so the tokens change from day to day; set "
    "data.chat_template_kwargs: {date_string: TEXT} to keep one date"
)
THOUGHT_NOTE = (
    "the chat template begins each answer with a thought, but the demonstration has none; an empty thought "
    "(</think>) is put before it"
)

EMPTY_THOUGHT_NOTE = (
    "the chat template writes an empty thought (<think></think>) before each demonstration, so the model is "
    "trained not to think; if the template has an argument for this, such as enable_thinking: false in "
    "data.chat_template_kwargs, the empty thought becomes part of the prompt"
)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The texts of a row, as the chat template writes them."""

    prompt: str
    completions: list[str | None]
    """What each completion adds to the prompt."""
    earlier: list[tuple[str, str]]
    """Prompt and completion of each earlier turn that is trained."""
    notes: set[str]
    later: "list[LaterTurn]" = field(default_factory=list["LaterTurn"])
    """The turns that follow the first one of the demonstration."""


class Results(NamedTuple):
    """A conversation of a user, who says nothing that matters, and an assistant, which calls tools."""

    closed: str
    """Up to the end of the assistant's turn."""
    answered: str
    """With the results of the tools, and the beginning of the next turn."""


class LaterTurn(NamedTuple):
    """A turn of the assistant after results of tools."""

    results: Results
    text: str
    """What the turn adds to all that precedes it."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A tokenizer's chat template with its arguments."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]
    """Arguments of the template. `date_string` also sets the date of templates that only read the clock."""
    tools: Sequence[Message] = ()
    """JSON schemas of functions."""
    parts: bool = False
    """Give content to the template as a list of parts, not as text."""
    json_arguments: bool = False
    """Give the arguments of tool calls as JSON text, not as a mapping."""
    notes: set[str] = field(default_factory=set[str])

    def render(self, messages: Sequence[Message], *, prompt: bool = True, marked: bool = False) -> str:
        """Text of the messages.

        Args:
            messages: At least one message, with text as content.
            prompt: Render a prompt: the last message is continued if it is the assistant's; otherwise the
                beginning of an answer follows it.
            marked: Append marks to all texts, and replace today's date by a mark.

        Raises:
            UsageError: There is no chat template, or it raised an error.
        """
        source = self.source
        if CLOCK in source and (marked or "date_string" in self.arguments):
            date = "date_string" if "date_string" in self.arguments else f"'{DATE_MARK}'"
            source = f"{{%- macro {CLOCK}(format) -%}}{{{{ {date} }}}}{{%- endmacro -%}}{source}"
        tools = [with_marked_name(tool, TOOL_MARK) if marked else tool for tool in self.tools]
        continued = prompt and messages[-1]["role"] == "assistant"
        options = {
            **self.arguments,
            "chat_template": source,
            "tools": tools or None,
            "tokenize": False,
            "continue_final_message": continued,
            "add_generation_prompt": prompt and not continued,
        }
        if marked:
            messages = [with_marks(index, message) for index, message in enumerate(messages)]
        try:
            formed = [self._formed(message) for message in messages]
            return str(cast("Any", self.tokenizer).apply_chat_template(formed, **options))
        except Exception as error:  # templates raise types of their authors' choice
            raise UsageError(f"the chat template raised an error: {error}") from error

    @property
    def source(self) -> str:
        """The template's text."""
        tokenizer = cast("Any", self.tokenizer)
        if tokenizer.chat_template is None and "chat_template" not in self.arguments:
            raise UsageError(
                "a chat needs a chat template, but the tokenizer has none; use a chat model's tokenizer, or "
                "strings as prompts with data.prompt_format: text (the default)"
            )
        if reserved := sorted(RESERVED & self.arguments.keys()):
            raise UsageError(f"chat_template_kwargs cannot set '{reserved[0]}'; remove it")
        given = self.arguments.get("chat_template")
        return str(tokenizer.get_chat_template(given, list(self.tools) or None))

    def check(self, messages: Sequence[Message], *, prompt: bool) -> None:
        """Check that every text is in the rendering, except thoughts, which templates remove from old turns.

        Raises:
            UsageError: A text is missing.
        """
        whole = self.render(messages, prompt=prompt, marked=True)
        if self.parts and re.search(r"""['"]type['"]: ['"]text['"]""", whole):
            raise UsageError("the chat template writes the list of content parts itself, not their text")
        if DATE_MARK in whole:
            self.notes.add(DATE_NOTE)
        for name in (function_of(tool)["name"] for tool in self.tools):
            if name + TOOL_MARK not in whole:
                raise UsageError(
                    f"the chat template does not render '{name}' of 'tools'; use a model whose template has "
                    "tools, remove rollout.tools, rollout.environment or the column, or rename the column "
                    "with data.columns if it is not for the template"
                )
        calls: list[str] = []
        for index, message in enumerate(messages):
            *pieces, last = _outside_thoughts(message)
            if message["content"].strip():
                pieces.append(last.lstrip() + MARK.format(index))
            for call in message.get("tool_calls", ()):
                name = function_of(call)["name"]
                calls.append(name)
                pieces += leaves(arguments_of(call))
                if whole.count(name + CALL_MARK) < calls.count(name):
                    pieces.append(name + MARK.format("lost"))
            lost = next((piece for piece in pieces if not occurs(piece, whole)), None)
            if lost is not None:
                text = re.sub(MARK.format(r"\w+?"), "", lost).strip()
                raise UsageError(
                    f"message {index + 1} (role '{message['role']}'): {text!r:.60} is not in what the chat "
                    "template renders; use a role and a form that the template supports, such as a 'system' "
                    "message in place of a 'developer' message, or remove it"
                )

    def completion(self, messages: Sequence[Message], turn: Message) -> str:
        """The text that the assistant message `turn` adds to the prompt `messages`.

        Raises:
            UsageError: The text cannot be found, or a part of the message is not in it.
        """
        prompt, joined = self.render(messages), _joined(messages, turn)
        whole = self.render(joined, prompt=False)
        pieces = [piece for piece in re.split("</?think>", turn["content"]) if piece.strip()]
        pieces += [turn[key] for key in REASONING if isinstance(turn.get(key), str)]
        if whole.startswith(prompt) and all(occurs(piece, whole[len(prompt) :]) for piece in pieces):
            thought = "</think>" in turn["content"] or any(turn.get(key) for key in REASONING)
            if "</think>" in whole[len(prompt) :] and not thought:
                self.notes.add(EMPTY_THOUGHT_NOTE)
            return whole[len(prompt) :]
        text = self._with_thought(messages, joined[-1], prompt, whole)
        lost = next((piece for piece in pieces if not occurs(piece, text)), None)
        if lost is not None:
            raise UsageError(
                f"the chat template removes a part of the demonstration: {lost.strip()!r:.60}; write a "
                "thought as <think>...</think> at the beginning of the content, and nothing before it"
            )
        return text

    def results(self, calls: Sequence[Message], results: Sequence[Message]) -> Results:
        """The rendering of results, which does not depend on the conversation that they belong to.

        A template that renders earlier turns differently once others follow, for example without their
        thoughts, therefore never changes the tokens of a trajectory.

        Args:
            calls: The tool calls of the assistant's message.
            results: Messages with role `tool`.

        Raises:
            UsageError: The template changes the assistant's turn when results follow.
        """
        named: list[Message] = [{"name": function_of(call)["name"], "arguments": {}} for call in calls]
        called = [{"type": "function", "function": function} for function in named]
        turn: Message = {"role": "assistant", "content": "", "tool_calls": called}
        begin = [{"role": "user", "content": "?"}, turn]
        closed, answered = self.render(begin, prompt=False), self.render([*begin, *results])
        if not answered.startswith(closed):
            # Qwen3's template, for example, adds an empty thought to the last turn only.
            closed = self._closed_turn(begin, answered)
        if not closed:
            raise UsageError(
                "the chat template renders a turn of the assistant differently when the result of a tool "
                "follows, so the tokens of the result are unknown; use another template "
                "(model.chat_template_path)"
            )
        return Results(closed, answered)

    def _closed_turn(self, begin: Sequence[Message], answered: str) -> str:
        """The beginning of `answered` up to the end token of the assistant's turn; "" if that is unknown."""
        other = self.render([*begin, {"role": "user", "content": MARK}])
        common = os.path.commonprefix([answered, other])  # noqa: RUF071 (characters are meant)
        before, end = self.render(begin[:1], prompt=False), str(self.tokenizer.eos_token)
        # Not by the name of the call: the policy chooses it, and it may be a part of any other text.
        stop = common.rfind(end) if common.startswith(before) else -1
        return common[: stop + len(end)] if stop >= len(before) else ""

    def _with_thought(self, messages: Sequence[Message], turn: Message, prompt: str, whole: str) -> str:
        """The completion with the thought that the template left out, or with an empty one.

        The template of DeepSeek-R1, for example, ends a prompt with "<think>" and renders answers without.
        """
        continued = messages[-1]["role"] == "assistant"
        before = self.render(messages[:-1] if continued else messages, prompt=False)
        header = prompt[len(before) :]
        start = len(prompt) if "<think>" not in header else prompt.rindex("<think>")
        opener = prompt[start:]
        usable = prompt.startswith(before) and whole.startswith(prompt[:start])
        if not usable or "</think>" in header or "</think>" not in self.source:
            raise UsageError(
                "the chat template renders the prompt differently when a completion follows, so the "
                "completion's tokens are unknown; change data.chat_template_kwargs (e.g. enable_thinking), "
                "or give 'prompt' and 'completion' as text that is already rendered"
            )
        rest = re.sub(r"\A(<think>\s*)?</think>", "", whole[start:])
        thought, closed, answer = turn["content"].rpartition("</think>")
        reasoning = next((turn[key] for key in REASONING if turn.get(key)), None)
        if closed:
            if thought.startswith(opener):
                thought = thought[len(opener) :]
            else:
                thought = thought.removeprefix("<think>").lstrip("\n")
            if answer.strip():
                rest = answer[: -len(answer.lstrip())] + rest.lstrip()
            return f"{thought}</think>{rest}"
        if reasoning is None:
            self.notes.add(THOUGHT_NOTE)
        thought = str(reasoning or "").strip()
        begin = "" if opener else "<think>\n"
        return f"{begin}{thought}\n</think>\n\n" + rest.lstrip("\n")

    def _formed(self, message: Message) -> Message:
        """The message in the form that the template takes."""
        message = dict(message)
        written = THOUGHT.match(message["content"].lstrip()) if message["role"] == "assistant" else None
        if written and "reasoning_content" in self.source and not any(key in message for key in REASONING):
            # Some templates read thoughts only from this key; the others treat both forms alike.
            thought = written[0].removeprefix("<think>").removesuffix("</think>")
            message["reasoning_content"] = thought.strip("\n")
            message["content"] = message["content"].lstrip()[len(written[0]) :].lstrip("\n")
        if self.parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message:
            message["tool_calls"] = [self._formed_call(call) for call in message["tool_calls"]]
        return message

    def _formed_call(self, call: Message) -> Message:
        function = {**function_of(call), "arguments": arguments_of(call)}
        if self.json_arguments:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function} if "function" in call else function


def render_conversation(
    messages: Sequence[Message],
    completions: Sequence[Message | None],
    earlier: Sequence[int],
    template: ChatTemplate,
    *,
    later: Sequence[Message] = (),
) -> Rendered:
    """Render a row, in the first form of content and arguments in which the template loses no text.

    Args:
        messages: The prompt.
        completions: Assistant messages that follow it, each without the others.
        earlier: Indices of the prompt's assistant messages that are trained.
        template: The chat template.
        later: What follows the first of the completions: results of tools, and further turns.

    Raises:
        UsageError: The template raised an error, or a text of the conversation is not in what it rendered.
    """
    calls = any("tool_calls" in message for message in (*messages, *completions, *later) if message)
    forms = [(False, False), *([(False, True)] if calls else []), (True, False)]
    failures: list[UsageError] = []
    for parts, json_arguments in forms:
        form = ChatTemplate(
            tokenizer=template.tokenizer,
            arguments=template.arguments,
            tools=template.tools,
            parts=parts,
            json_arguments=json_arguments,
        )
        try:
            given = [turn for turn in completions if turn is not None]
            for number, turn in enumerate(given):
                form.check([*_joined(messages, turn), *(later if number == 0 else ())], prompt=False)
            if not given:
                form.check(messages, prompt=True)
            turns = [(messages[:index], messages[index]) for index in earlier]
            return Rendered(
                prompt=form.render(messages),
                completions=[
                    None if turn is None else form.completion(messages, turn) for turn in completions
                ],
                earlier=[(form.render(before), form.completion(before, turn)) for before, turn in turns],
                notes=form.notes,
                later=_later_turns(form, [*messages, *given[:1]], later),
            )
        except UsageError as error:
            failures.append(error)
    # A form that the template does not take makes it raise, or lose every text.
    raise next((error for error in failures if error.__cause__ is None), failures[0])


def _later_turns(form: ChatTemplate, before: list[Message], later: Sequence[Message]) -> list[LaterTurn]:
    """The turns in `later`, each with the results that precede it.

    Args:
        before: The prompt and the first turn.
    """
    turns: list[LaterTurn] = []
    results: list[Message] = []
    for message in later:
        if message["role"] == "tool":
            results.append(message)
            continue
        calls = before[-1].get("tool_calls")
        if not calls:
            raise UsageError("a result of a tool follows an assistant message without 'tool_calls'")
        before = [*before, *results]
        turns.append(LaterTurn(form.results(calls, results), form.completion(before, message)))
        before, results = [*before, message], []
    return turns


def _joined(messages: Sequence[Message], turn: Message) -> list[Message]:
    """The messages with the assistant's turn; it continues a last message of the assistant."""
    if messages[-1]["role"] != "assistant":
        return [*messages, turn]
    last = messages[-1]
    return [*messages[:-1], {**last, **turn, "content": last["content"] + turn["content"]}]


def _outside_thoughts(message: Message) -> list[str]:
    """The content, split at the thoughts of an assistant message."""
    return THOUGHT.split(message["content"]) if message["role"] == "assistant" else [message["content"]]
