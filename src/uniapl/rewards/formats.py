"""Reward functions for the form of a completion: TRL's `think_format_reward`, and a JSON schema."""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from uniapl.data.parsing import strict_json
from uniapl.errors import UsageError
from uniapl.rewards.base import RowCheck
from uniapl.rewards.builtin import completion_text
from uniapl.rewards.finding import register
from uniapl.rewards.instructions import text_after
from uniapl.types import Example
from uniapl.untyped import is_dict, is_list

THINK_FORMAT = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
"""TRL's pattern."""


@register("think_format_reward")
def think_format_reward(completions: list[Any]) -> list[float]:
    """1.0 if the completion begins with one `<think>` and `</think>` follows, else 0.0."""
    return [float(bool(THINK_FORMAT.match(completion_text(completion)))) for completion in completions]


@register("json_schema")
def json_schema(
    completions: list[Any], schema: Any, *, answer_after: str | None = None
) -> list[float | Exception]:
    """1.0 if the whole completion is strict JSON that its schema accepts, else 0.0.

    `format` is an annotation, as in the standard, and references to other addresses are not followed.

    Args:
        schema: One schema for all rows (in `args`), or a column with one per row: a mapping or JSON text.
        answer_after: Only the text after this mark is scored, e.g. "</think>"; a completion without the mark
            counts as empty.
    """
    schemas = schema if is_list(schema) else [schema] * len(completions)
    scores: list[float | Exception] = []
    for completion, wanted in zip(completions, schemas, strict=True):
        validator = _validator(_as_json(wanted))
        try:
            value = strict_json(text_after(completion_text(completion), answer_after))
        except (ValueError, RecursionError):
            scores.append(0.0)
            continue
        try:
            scores.append(float(validator.is_valid(value)))
        except Exception as error:  # the schema has an unknown reference, an invalid regular expression, ...
            scores.append(error)
    return scores


def check_schemas(examples: Sequence[Example], *, schema: Any = None, **_: Any) -> RowCheck:
    """Check the schema in `args`, or that of each row.

    Raises:
        UsageError: jsonschema is not installed, or a schema is invalid.
    """
    if schema is not None:
        _validator(_as_json(schema))
        return RowCheck()
    for example in examples:
        try:
            _validator(_as_json(example.columns["schema"]))
        except UsageError as error:
            raise UsageError(f"row {example.row}: {error}") from error
    return RowCheck()


def _as_json(schema: Any) -> str:
    try:
        return schema if isinstance(schema, str) else json.dumps(schema)
    except TypeError as error:
        raise UsageError(f"json_schema: the schema is not JSON: {error}") from error


@functools.lru_cache(maxsize=1024)
def _validator(text: str) -> Any:
    """The validator of a schema, for the draft that it names or else 2020-12.

    Raises:
        UsageError: jsonschema is not installed, or the schema is invalid.
    """
    try:
        import jsonschema.validators
        import jsonschema_specifications
    except ImportError as error:
        raise UsageError("json_schema needs jsonschema: pip install 'uniapl[jsonschema]'") from error
    try:
        schema: Any = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"json_schema: the schema is not JSON ({error}): {text:.80}") from error
    if not (isinstance(schema, bool) or is_dict(schema)):
        raise UsageError(f"json_schema: a schema must be a mapping, not {text:.80}")
    kind: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"json_schema: invalid schema: {error.message} (at {error.json_path})") from error
    # Without this registry of the drafts themselves, jsonschema downloads what a reference names.
    return kind(schema, registry=jsonschema_specifications.REGISTRY)


json_schema.check_rows = check_schemas  # type: ignore[attr-defined]
