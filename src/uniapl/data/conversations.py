"""Read the columns of a row as a conversation, and render it with the chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from uniapl.errors import UsageError
from uniapl.types import Prompt

Message = dict[str, Any]
Completion = str | list[Message] | None
"""The completion of a row: text, one assistant message, or None."""


def prompt_and_completion(row: Mapping[str, Any]) -> tuple[Prompt, Completion]:
    """The prompt of a row, and its demonstration.

    Raises:
        UsageError: The row has no prompt, or its columns contradict each other.
    """
    if "messages" in row:
        if "chosen" in row or "rejected" in row:
            raise UsageError("'chosen' and 'rejected' need 'prompt', not 'messages'")
        messages = checked_messages("'messages'", row["messages"])
        if messages[-1]["role"] != "assistant":
            return messages, None
        if len(messages) == 1:
            raise UsageError("'messages' has a completion but no prompt")
        return messages[:-1], messages[-1:]
    if "completion" in row and "chosen" in row:
        raise UsageError("both 'completion' and 'chosen' could be the demonstration; remove one")
    column = "chosen" if "chosen" in row else "completion"
    prompt = row.get("prompt")
    if prompt is None and column == "chosen" and not isinstance(row["chosen"], str):
        # TRL's implicit prompt: 'chosen' and 'rejected' are complete conversations.
        prompt = checked_messages("'chosen'", row["chosen"])[:-1] or None
    if prompt is None:
        known = ", ".join(sorted(str(column) for column in row)) or "none"
        raise UsageError(
            f"no 'prompt' and no 'messages' (columns: {known:.200}); rename a column with data.columns, e.g. "
            "{question: prompt}"
        )
    if not isinstance(prompt, str):
        prompt = checked_messages("'prompt'", prompt)
    return prompt, completion_of(row, column, prompt)


def completion_of(row: Mapping[str, Any], column: str, prompt: Prompt) -> Completion:
    """Text or one assistant message; the prompt is removed from the beginning of a conversation."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value
    messages = checked_messages(f"'{column}'", value)
    if not isinstance(prompt, str) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UsageError(
            f"'{column}' must be a string, one assistant message, or a conversation that begins with the "
            "row's prompt"
        )
    return messages


def checked_messages(name: str, value: Any) -> list[Message]:
    """The chat messages in `value`, without keys whose value is None.

    Raises:
        UsageError: `value` holds no chat messages; the error begins with `name`.
    """
    messages = list(value) if isinstance(value, (list, tuple)) else []
    valid = all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and m.get("content") is not None
        for m in messages
    )
    if not messages or not valid:
        raise UsageError(
            f"{name} must be a string or a list of messages with 'role' and 'content', got {value!r:.80}"
        )
    return [{key: item for key, item in message.items() if item is not None} for message in messages]


def render_chat(
    messages: list[Message],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any],
) -> tuple[str, list[str | None]]:
    """The prompt's text with the generation prompt, and the text that each completion adds to it."""
    if tokenizer.chat_template is None:
        raise UsageError(
            "a chat needs a chat template, but the tokenizer has none; use a chat model's tokenizer, or "
            "strings as prompts with data.prompt_format: text (the default)"
        )

    def render(turns: list[Message], **options: Any) -> str:
        template: Any = tokenizer.apply_chat_template
        try:
            return str(template(turns, tokenize=False, **options, **chat_template_kwargs))
        except Exception as error:  # templates raise types of their authors' choice
            raise UsageError(f"the chat template raised an error: {error}") from error

    prompt = render(messages, add_generation_prompt=True)
    texts: list[str | None] = []
    for completion in completions:
        turn = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        text = None if turn is None else render(messages + turn, add_generation_prompt=False)
        if text is not None and not text.startswith(prompt):
            raise UsageError(
                "the chat template renders the prompt differently when a completion follows, so the "
                "completion's tokens are unknown; change data.chat_template_kwargs (e.g. enable_thinking)"
            )
        texts.append(text and text[len(prompt) :])
    return prompt, texts


def plain_text(completion: Completion) -> str | None:
    """The text of a completion.

    Raises:
        UsageError: The content of the message is not text.
    """
    if completion is None or isinstance(completion, str):
        return completion
    content = completion[0]["content"]
    if not isinstance(content, str):
        raise UsageError(f"the content of the demonstration must be text, got {content!r:.80}")
    return content
