"""From rows to requests, and from replies to rows of a training file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uniapl.collect.cache import Reply
from uniapl.config import DataConfig
from uniapl.data.conversations import checked_messages
from uniapl.data.formats import standard_columns
from uniapl.data.reading import named_source, read_rows
from uniapl.errors import UsageError
from uniapl.types import Prompt


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


def read_prompts(path: str, limit: int | None) -> list[PromptRow]:
    """The rows of a file of prompts, in any form that training reads.

    Raises:
        UsageError: The file or a row cannot be used.
    """
    rows = read_rows(DataConfig(path=path))
    with named_source(rows):
        return [_prompt_row(number, row) for number, row in rows[:limit]]


def prompt_of(number: int, row: Any) -> tuple[str, Prompt]:
    """The column with the prompt ('prompt' or 'messages'), and the prompt.

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
    if prompt is None:
        raise UsageError(f"row {number} has no 'prompt' and no 'messages' (columns: {', '.join(row):.200})")
    if column == "messages" or not isinstance(prompt, str):
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


def completion_of(reply: Reply, *, keep_thinking: bool) -> tuple[str, str | None]:
    """(completion, None), or ("", reason) if the reply cannot be used as a demonstration."""
    text = reply.content
    before, closed, after = text.partition("</think>")
    thinks = text.lstrip().startswith("<think>")
    if reply.finish_reason == "length" or (thinks and not closed):
        return "", "truncated"
    if reply.finish_reason == "content_filter":
        return "", "refused by a content filter"
    # Some chat templates open <think> in the prompt: the completion then only closes it.
    if closed and (thinks or "<think>" not in before):
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


def demonstrations_of(
    rows: list[PromptRow],
    settings: Settings,
    num_samples: int,
    replies: Mapping[str, Reply],
    *,
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
            completion, reason = completion_of(reply, keep_thinking=keep_thinking)
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
