"""Command-line flags: `--section.key value` sets a key, also inside a list or a mapping of the recipe."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, JsonValue

from uniapl.config import Config
from uniapl.config.suggestions import unknown
from uniapl.errors import UsageError
from uniapl.untyped import is_dict, is_list

Values = list[tuple[tuple[str, ...], Any]]
"""(path of the key, value as given), in the order of the flags."""


def parse_flags(flags: Sequence[str]) -> Values:
    """The keys that flags set; the configuration converts the texts to the types of the keys.

    A flag without a value sets a boolean key to true. A list takes several values.

    Raises:
        UsageError: A flag is unknown, or has no value or too many.
    """
    parsed: Values = []
    for flag, texts in _groups(flags):
        path, annotation = _find(flag)
        parsed.append((path, _value(flag, annotation, texts)))
    return parsed


def apply_flags(values: dict[str, Any], parsed: Values) -> dict[str, Any]:
    """`values`, changed in place.

    Raises:
        UsageError: A flag addresses an entry that a list does not have.
    """
    for path, value in parsed:
        target: Any = values
        for depth, part in enumerate(path, start=1):
            index: Any = part
            if is_list(target):
                if not part.isdigit() or int(part) >= len(target):
                    key = ".".join(path[: depth - 1])
                    raise UsageError(f"{flag_of(path)}: {key} has {len(target)} entries, counted from 0")
                index = int(part)
            elif not is_dict(target):
                raise UsageError(unknown(flag_of(path), "flag"))
            if depth == len(path):
                target[index] = value
                continue
            inner = target.setdefault(part, {}) if is_dict(target) else target[index]
            target[index] = [*inner] if isinstance(inner, tuple) else inner
            target = target[index]
    return values


def flag_of(path: Sequence[str]) -> str:
    """The flag that sets a key."""
    return f"--{'.'.join(path).replace('_', '-')}"


def _groups(flags: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values."""
    position = 0
    while position < len(flags):
        flag, equals, value = flags[position].partition("=")
        if not flag.startswith("--"):
            raise UsageError(f"unexpected argument '{flag:.80}': flags are --key value")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(flags) and not flags[position].startswith("--"):
            values.append(flags[position])
            position += 1
        yield flag, values


def _find(flag: str) -> tuple[tuple[str, ...], Any]:
    """The path of a flag's key, and the type of its value."""
    annotation: Any = Config
    path: list[str] = []
    parts = flag.removeprefix("--").split(".")
    for depth, part in enumerate(parts):
        kinds, name = _alternatives(annotation), part.replace("-", "_")
        if _is_section(annotation) and name in annotation.model_fields:
            annotation = annotation.model_fields[name].annotation
        elif dict in kinds:  # Its keys may contain hyphens.
            return (*path, ".".join(parts[depth:])), get_args(annotation)[1]
        elif tuple in kinds and name.isdigit():
            # A stage is a mapping with the keys of a recipe.
            annotation = Config if path == ["stages"] else get_args(annotation)[0]
        else:
            raise UsageError(unknown(flag, "flag"))
        path.append(name)
    if _is_section(annotation) and not path[-1].isdigit():
        raise UsageError(unknown(flag, "flag"))
    return tuple(path), annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> set[Any]:
    """The types of a union, without their parameters."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return set[Any]().union(*map(_alternatives, get_args(annotation)))
    return {origin or annotation}


def _value(flag: str, annotation: Any, texts: list[str]) -> Any:
    kinds = _alternatives(annotation)
    if flag == "--stages":
        raise UsageError("--stages: stages can only be set in the recipe; --stages.0.max-steps changes one")
    if not texts and bool in kinds:
        return True
    if tuple in kinds and (len(texts) != 1 or str not in kinds):
        whole = _plain(texts[0]) if len(texts) == 1 and texts[0].startswith("[") else None
        # A reward function is a name or a mapping.
        return whole if is_list(whole) else [_plain(t) if t.startswith("{") else t for t in texts]
    if dict in kinds:
        whole = _plain(" ".join(texts))
        if is_dict(whole):
            return whole
        if len(texts) % 2 == 0:
            return {
                name: _typed(get_args(annotation)[1], text)
                for name, text in zip(texts[::2], texts[1::2], strict=True)
            }
        raise UsageError(
            f"{flag}: expected a mapping such as '{{name: value}}' (got {' '.join(texts)!r:.80})"
        )
    if len(texts) != 1:
        problem = f"takes one value (got {' '.join(texts)!r:.80})" if texts else "needs a value"
        raise UsageError(f"{flag} {problem}")
    return _typed(annotation, texts[0])


def _typed(annotation: Any, text: str) -> Any:
    """The text, or a plain value where the key's type does not determine one."""
    kinds = _alternatives(annotation)
    if types.NoneType in kinds and text in ("null", "None"):
        return None
    any_type = annotation is JsonValue or (bool in kinds and str in kinds)
    return _plain(text) if any_type or _is_section(annotation) else text


def _plain(text: str) -> Any:
    """The value that YAML reads; the text itself if that is not plain data."""
    try:
        value = yaml.safe_load(text)
    except Exception:  # PyYAML lets errors of int() and date() through.
        return text
    if value is None and text not in ("null", "~"):  # a comment, such as ####
        return text
    is_plain = is_list(value) or is_dict(value) or isinstance(value, (bool, int, float, type(None)))
    return value if is_plain else text
