"""Rows of a file -> what is asked; answers -> rows of a training file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uniapl.collect.cache import Answer
from uniapl.config import DataConfig
from uniapl.data import rows as data
from uniapl.errors import UsageError
from uniapl.types import Prompt

WRITTEN = ("completion", "source")
"""Columns that collecting adds."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row without an answer."""

    row: int
    prompt: Prompt
    columns: dict[str, Any]
    """All others, as they were."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked beside the prompt."""

    model: str
    sampling: dict[str, Any] = field(default_factory=dict)
    """Only what was given: for the rest the endpoint has its own defaults."""
    seed: int | None = None
    """Of sample 0; sample k has seed + k, or all samples of a prompt would be one."""
    system_prompt: str | None = None

    def body(self, prompt: Prompt, sample: int) -> dict[str, Any]:
        """The request for one answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        seed = {} if self.seed is None else {"seed": self.seed + sample}
        return {"model": self.model, "messages": messages, **self.sampling, **seed}

    def key(self, prompt: Prompt, sample: int) -> str:
        """The digest under which the answer is kept: equal requests of one sample number are one."""
        text = json.dumps([self.body(prompt, sample), sample], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A question with one usable answer."""

    question: Question
    completion: str
    source: dict[str, Any]

    def line(self) -> str:
        """The row of the training file."""
        row = {**self.question.columns, "prompt": self.question.prompt}
        return json.dumps({**row, "completion": self.completion, "source": self.source}) + "\n"


def read_questions(path: str, limit: int | None) -> list[Question]:
    """The rows of a file of prompts, in the forms that training reads.

    Raises:
        UsageError: The file or a row cannot be used.
    """
    rows = data.read_rows(DataConfig(path=path))[:limit]
    with data.named_source(path):
        return [_question(number, row) for number, row in rows]


def _question(number: int, row: Any) -> Question:
    if not isinstance(row, Mapping):
        raise UsageError(f"row {number} is not a mapping of columns to values: {row!r:.80}")
    for column in (*WRITTEN, "chosen"):
        if row.get(column) is not None:
            raise UsageError(
                f"row {number} has a '{column}' already, which collecting would replace: rename the column, "
                "or take it or the row out"
            )
    column = "prompt" if row.get("messages") is None else "messages"
    prompt = row.get(column)
    if prompt is None:
        raise UsageError(f"row {number} has no 'prompt' and no 'messages' (columns: {', '.join(row):.200})")
    if column == "messages" or not isinstance(prompt, str):
        prompt = data.checked_messages(f"row {number}: '{column}'", prompt)
        if prompt[-1]["role"] == "assistant":
            raise UsageError(f"row {number}: '{column}' ends with an answer already: take that message out")
    elif not prompt.strip():
        raise UsageError(f"row {number}: the prompt is empty")
    # A training row with 'messages' would have its answer there, not in 'completion'.
    columns = {name: value for name, value in row.items() if name not in ("prompt", "messages")}
    try:
        json.dumps([prompt, columns])
    except TypeError as error:
        raise UsageError(f"row {number} has a value that JSON cannot hold: {error}") from error
    return Question(row=number, prompt=prompt, columns=columns)


def completion_of(answer: Answer, *, keep_thinking: bool) -> tuple[str, str | None]:
    """(the text to learn, None), or ("", why the answer is of no use)."""
    text = answer.content
    before, closed, after = text.partition("</think>")
    thinks = text.lstrip().startswith("<think>")
    if answer.finish_reason == "length" or (thinks and not closed):
        return "", "cut short"
    if answer.finish_reason == "content_filter":
        return "", "refused by a content filter"
    # Some chat templates open the thoughts in the prompt: the answer then only closes them.
    if closed and (thinks or "<think>" not in before):
        text = after.lstrip()
    if not text.strip():
        return "", "empty"
    if keep_thinking:
        text = answer.content
        if answer.reasoning.strip():
            text = f"<think>\n{answer.reasoning.strip()}\n</think>\n\n{text}"
    if text != text.encode(errors="ignore").decode():
        # Half of a surrogate pair: one such answer would make the whole file unfit for training.
        return "", "not valid Unicode"
    return text, None


def demonstrations_of(
    questions: list[Question],
    settings: Settings,
    num_samples: int,
    answers: Mapping[str, Answer],
    *,
    keep_thinking: bool,
) -> tuple[list[Demonstration], dict[str, list[int]]]:
    """What can be learnt from, in the order of the rows; and reason -> rows whose answers were dropped."""
    usable: list[Demonstration] = []
    dropped: dict[str, list[int]] = {}
    for question in questions:
        for sample in range(num_samples):
            answer = answers.get(settings.key(question.prompt, sample))
            if answer is None:
                continue
            completion, reason = completion_of(answer, keep_thinking=keep_thinking)
            if reason is not None:
                dropped.setdefault(reason, []).append(question.row)
                continue
            source = _source(answer, settings, sample)
            usable.append(Demonstration(question=question, completion=completion, source=source))
    return usable, dropped


def _source(answer: Answer, settings: Settings, sample: int) -> dict[str, Any]:
    told = settings.body("", sample)
    told = {key: value for key, value in told.items() if key not in ("model", "messages")}
    if settings.system_prompt is not None:
        told["system_prompt"] = settings.system_prompt
    return {
        "model": answer.model,
        "url": answer.url,
        "settings": told,
        "date": answer.date,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
        "sample": sample,
    }
