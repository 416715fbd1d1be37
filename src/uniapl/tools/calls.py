"""Read the tool calls in a completion with transformers' response templates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import parse_response

from uniapl.data.conversations import Message, function_of
from uniapl.data.rendering import ChatTemplate
from uniapl.data.tokenization import without_end
from uniapl.errors import UsageError
from uniapl.tools.functions import without_surrogates
from uniapl.types import TokenIds

ANCHOR = "\x02"
"""Stands for the prompt, in which nothing is searched."""
MAX_DEPTH = 64
"""Levels of lists and mappings in a call. Python cannot copy or write very deep values. Our choice."""
PROBE = {"number": 5, "text": "five"}


class Calls(NamedTuple):
    """The tool calls of a turn."""

    calls: list[Message]
    """In the form of a message's `tool_calls`."""
    malformed: bool
    """The turn begins a call that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class CallParser:
    """Reads tool calls in the form in which the chat template writes them."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Collection[int]
    template: Mapping[str, Any]
    """A response template of transformers."""
    tools: Sequence[Message]
    """Schemas, by which values that are not JSON get their types."""

    @staticmethod
    def of(form: ChatTemplate, stop_ids: Collection[int]) -> "CallParser":
        """The parser for the tokenizer's own response template, or for the first format that reads a probe.

        Raises:
            UsageError: No known format is that of the chat template.
        """
        own = getattr(form.tokenizer, "response_template", None)
        candidates: list[Mapping[str, Any]] = [own] if own else [entry["template"] for entry in _formats()]
        for template in candidates:
            parser = CallParser(
                tokenizer=form.tokenizer, stop_ids=stop_ids, template=template, tools=form.tools
            )
            if parser._reads_the_probe(form):
                return parser
        which = "the tokenizer's response_template does not read" if own else "no known format reads"
        raise UsageError(
            f"{which} the tool calls that the chat template writes; set `response_template` in "
            "tokenizer_config.json (transformers' documentation: response parsing)"
        )

    def read(self, ids: TokenIds) -> Calls:
        """The calls in the token ids of a turn; a thought before them is skipped."""
        text = str(self.tokenizer.decode(list(without_end(ids, self.stop_ids))))
        return self._read(text.rpartition("</think>")[2])

    def _read(self, text: str) -> Calls:
        try:
            found = parse_response(text, self._anchored, prefix=ANCHOR, tools=[*self.tools] or None)
        except (ValueError, TypeError, KeyError, RecursionError):
            return Calls([], malformed=True)
        calls = found.get("tool_calls") or []
        usable = [
            isinstance(function_of(call).get("name"), str) and _is_storable(call, MAX_DEPTH) for call in calls
        ]
        return Calls(calls, malformed=False) if all(usable) else Calls([], malformed=True)

    @property
    def _anchored(self) -> dict[str, Any]:
        return {**self.template, "start_anchor": ANCHOR}

    def _reads_the_probe(self, form: ChatTemplate) -> bool:
        call = {"type": "function", "function": {"name": "probe", "arguments": PROBE}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        user = {"role": "user", "content": "?"}
        properties = {"number": {"type": "integer"}, "text": {"type": "string"}}
        schema = {"name": "probe", "parameters": {"type": "object", "properties": properties}}
        probing = CallParser(
            tokenizer=self.tokenizer,
            stop_ids=self.stop_ids,
            template=self.template,
            tools=[{"type": "function", "function": schema}],
        )
        text = form.completion([user], turn)
        for token in self.stop_ids:
            text = text.split(str(self.tokenizer.decode([token])))[0]
        found = probing._read(text.rpartition("</think>")[2]).calls
        return [function_of(one) for one in found] == [call["function"]]


def _is_storable(value: Any, depth: int) -> bool:
    """Whether the value has at most `depth` levels, and all of its text can be encoded.

    JSON's escapes can write halves of surrogate pairs, which no tokenizer and no file takes.
    """
    if isinstance(value, str):
        return value == without_surrogates(value)
    if not isinstance(value, Mapping | list):
        return True
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    return depth > 0 and all(_is_storable(item, depth - 1) for item in items)


@cache
def _formats() -> list[dict[str, Any]]:
    return yaml.safe_load((files("uniapl.tools") / "formats.yaml").read_text(encoding="utf-8"))
