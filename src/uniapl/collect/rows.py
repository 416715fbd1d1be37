"""From rows to requests, and from replies to rows of a training file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from uniapl.collect.cache import Reply
from uniapl.config import DataConfig
from uniapl.data.conversations import checked_messages
from uniapl.data.formats import standard_columns
from uniapl.data.reading import named_source, read_rows
from uniapl.errors import UsageError
from uniapl.types import Prompt

COMPLETE = {"stop", "eos", "eos_token", "stop_token", "end_turn", "stop_sequence", "complete", "completed"}
TRUNCATED = {"length", "max_length", "max_tokens", "max_output_tokens", "model_length"}
DROPPED = {
    "a tool call": {"tool_calls", "function_call", "tool_use"},
    "refused by the model": {"refusal"},
    "refused by a content filter": {
        *("content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content"),
        *("spii", "sensitive", "guardrail_intervened"),
    },
}
"""Finish reasons of OpenAI, Anthropic, Gemini, Mistral, Cohere and TGI, in lower case, by what they mean."""
THINKING_KEYS = ("enable_thinking", "thinking", "reasoning", "reasoning_effort", "thinking_budget")
"""Keys of a request, or of its chat_template_kwargs, that turn thinking on or off."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A row without a demonstration."""

    number: int
    prompt: Prompt
    columns: dict[str, Any]
    """All other columns, unchanged."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a request but its prompt."""

    model: str
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling settings given by the user; the endpoint's defaults apply to all others."""
    seed: int | None = None
    """Seed of sample 0; sample k has seed + k, so that the samples of a prompt differ."""
    system_prompt: str | None = None

    def body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        """The body of the request for one sample."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        seed = {} if self.seed is None else {"seed": self.seed + sample}
        return {"model": self.model, "messages": messages, **self.sampling, **seed}

    @property
    def asks_for_thinking(self) -> bool:
        """Whether a key of the request turns thinking on."""
        template = self.sampling.get("chat_template_kwargs")
        options = self.sampling | (template if isinstance(template, dict) else {})
        return any(_is_on(options.get(name)) for name in THINKING_KEYS)

    def key(self, prompt: Prompt, sample: int) -> str:
        """The digest under which the reply is cached; equal requests for the same sample number share it."""
        text = json.dumps([self.body(prompt, sample), sample], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A row with a usable completion."""

    row: PromptRow
    completion: str
    source: dict[str, Any]

    def line(self) -> str:
        """The line of the training file."""
        columns = {**self.row.columns, "prompt": self.row.prompt}
        return json.dumps({**columns, "completion": self.completion, "source": self.source}) + "\n"


def _is_on(value: Any) -> bool:
    if isinstance(value, Mapping):  # {"type": "enabled", ...}, {"effort": "high"}, {"enabled": true}
        return all(_is_on(value[name]) for name in ("type", "effort", "enabled") if name in value)
    return bool(value) and value not in ("none", "disabled", "off")


def read_prompts(path: str, limit: int | None) -> list[PromptRow]:
    """The rows of a file of prompts, in any form that training reads.

    Raises:
        UsageError: The file or a row cannot be used.
    """
    rows = read_rows(DataConfig(path=path))
    with named_source(rows):
        return [_prompt_row(number, row) for number, row in rows[:limit]]


def prompt_of(number: int, row: Any) -> tuple[str, Prompt]:
    """The column with the prompt ('prompt', 'messages' or 'chosen'), and its value.

    The answer may be the last of 'messages', and is that of 'chosen'.

    Raises:
        UsageError: The row has no prompt, or an invalid one.
    """
    if not isinstance(row, Mapping):
        raise UsageError(f"row {number} is not a mapping of columns to values: {row!r:.80}")
    try:
        row = standard_columns({name: value for name, value in row.items() if value is not None}, row)
    except UsageError as error:
        raise UsageError(f"row {number}: {error}") from error
    column = "prompt" if row.get("messages") is None else "messages"
    prompt = row.get(column)
    if prompt is None and isinstance(row.get("chosen"), list):
        # TRL's implicit prompt: 'chosen' and 'rejected' are complete conversations.
        column, prompt = "chosen", row["chosen"]
    if prompt is None:
        raise UsageError(f"row {number} has no 'prompt' and no 'messages' (columns: {', '.join(row):.200})")
    if column != "prompt" or not isinstance(prompt, str):
        return column, checked_messages(f"row {number}: '{column}'", prompt)
    if not prompt.strip():
        raise UsageError(f"row {number}: the prompt is empty")
    return column, prompt


def _prompt_row(number: int, row: Any) -> PromptRow:
    column, prompt = prompt_of(number, row)
    for written in ("completion", "source", "chosen"):
        if row.get(written) is not None:
            raise UsageError(
                f"row {number} already has a '{written}', which collect would replace: rename the column, "
                "or remove it or the row"
            )
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise UsageError(f"row {number}: '{column}' already ends with a completion: remove that message")
    # Training would look for the demonstration in 'messages', not in 'completion'.
    columns = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
    try:
        json.dumps([prompt, columns])
        json.dumps(prompt, ensure_ascii=False).encode()  # half of a surrogate pair cannot be sent
    except (TypeError, UnicodeEncodeError) as error:
        raise UsageError(f"row {number} has a value that cannot be written as UTF-8 JSON: {error}") from error
    return PromptRow(number=number, prompt=prompt, columns=columns)


def completion_of(reply: Reply, *, thinking: bool, keep_thinking: bool) -> tuple[str, str | None]:
    """(completion, None), or ("", reason) if the reply cannot be used as a demonstration.

    Args:
        thinking: The content may begin with thoughts that no <think> opens, because the template opens it.
    """
    text = reply.content
    _, closed, after = text.partition("</think>")
    opened = text.lstrip().startswith("<think>")
    ended = _finish_reason(reply)
    for reason, names in DROPPED.items():
        if ended in names:
            return "", reason
    if ended not in COMPLETE or (opened and not closed):
        return "", "truncated"
    # In any other text, </think> is a part of the answer.
    if closed and (opened or (thinking and not reply.reasoning)):
        text = after.lstrip()
    if not text.strip():
        return "", "empty"
    if keep_thinking:
        text = reply.content
        if reply.reasoning.strip():
            text = f"<think>\n{reply.reasoning.strip()}\n</think>\n\n{text}"
    if text != text.encode(errors="ignore").decode():
        # Half of a surrogate pair would make the complete file unusable for training.
        return "", "not valid Unicode"
    return text, None


def notes_on(replies: Iterable[Reply], *, thinking: bool) -> list[str]:
    """Notes on replies whose form leaves a doubt: an unknown finish reason, and thoughts that may be kept."""
    notes: list[str] = []
    known = COMPLETE.union(TRUNCATED, *DROPPED.values())
    replies = list(replies)
    if unknown := [reply for reply in replies if _finish_reason(reply) not in known]:
        listed = ", ".join(sorted({str(reply.finish_reason or "null") for reply in unknown}))
        notes.append(
            f"{len(unknown)} replies have a missing or unknown finish_reason ({listed:.200}) and count as "
            "truncated, because they may be incomplete"
        )
    open_ended = [r for r in replies if "</think>" in r.content and "<think>" not in r.content]
    if open_ended and not thinking:
        notes.append(
            f"{len(open_ended)} replies contain </think> without <think> and are kept whole; if the model "
            "thinks before it answers, repeat the command with --thinking, which removes the text before it"
        )
    return notes


def _finish_reason(reply: Reply) -> str:
    return (reply.finish_reason or "").rpartition(".")[2].strip().lower().replace("-", "_")


def demonstrations_of(
    rows: list[PromptRow],
    settings: Settings,
    num_samples: int,
    replies: Mapping[str, Reply],
    *,
    thinking: bool,
    keep_thinking: bool,
) -> tuple[list[Demonstration], dict[str, list[int]]]:
    """The usable demonstrations in the order of the rows, and the dropped replies' row numbers by reason."""
    usable: list[Demonstration] = []
    dropped: dict[str, list[int]] = {}
    for row in rows:
        for sample in range(num_samples):
            reply = replies.get(settings.key(row.prompt, sample))
            if reply is None:
                continue
            completion, reason = completion_of(reply, thinking=thinking, keep_thinking=keep_thinking)
            if reason is not None:
                dropped.setdefault(reason, []).append(row.number)
                continue
            source = _source(reply, settings, sample)
            usable.append(Demonstration(row=row, completion=completion, source=source))
    return usable, dropped


def _source(reply: Reply, settings: Settings, sample: int) -> dict[str, Any]:
    request = settings.body("", sample)
    request = {key: value for key, value in request.items() if key not in ("model", "messages")}
    if settings.system_prompt is not None:
        request["system_prompt"] = settings.system_prompt
    return {
        "model": reply.model,
        "url": reply.url,
        "settings": request,
        "date": reply.date,
        "finish_reason": reply.finish_reason,
        "usage": {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens},
        "sample": sample,
    }
