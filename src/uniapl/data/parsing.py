"""Parse the text of JSON, JSON Lines and CSV files into numbered rows, with every value as it is written."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from uniapl.errors import UsageError

NumberedRow = tuple[int, Any]
_WHITE_SPACE = re.compile(r"\s*")
_QUOTED = re.compile(r'"[^"]*"')


def strict_json(text: str) -> Any:
    """One JSON value; duplicate keys, NaN and numbers beyond float64 are errors.

    Raises:
        ValueError: The text is not strict JSON.
        RecursionError: It is nested too deeply.
    """
    return _DECODER.decode(text)


def parse_json_lines(text: str) -> Iterator[NumberedRow]:
    """One row per line, numbered by line; empty lines are skipped.

    Raises:
        UsageError: A line is not strict JSON.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, strict_json(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise UsageError(f"line {number}: invalid JSON ({reason})") from error


def parse_json(text: str) -> Iterator[NumberedRow]:
    """The items of a list, or JSON Lines.

    Raises:
        UsageError: The text is neither, or is not strict JSON.
    """
    if text.lstrip().startswith("["):
        yield from _list_items(text)
    elif text.lstrip().startswith("{") and _is_one_object_on_several_lines(text):
        raise UsageError("expected a list of rows, or one row per line, but the file is one object")
    else:
        yield from parse_json_lines(text)


def parse_csv(text: str, delimiter: str) -> Iterator[NumberedRow]:
    """The rows under a header. Every cell is text; an empty cell is None.

    Args:
        text: The content of the file.
        delimiter: The character between two cells. A comma also stands for the semicolon or tab of a header
            that has no comma.

    Raises:
        UsageError: The quotes are invalid, two columns have the same name, or a row has more or fewer cells
            than the header.
    """
    first = _QUOTED.sub("", re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0])
    if delimiter == "," and "," not in first:
        delimiter = next((other for other in ";\t" if other in first), delimiter)
    csv.field_size_limit(2**31 - 1)  # The default of 128 KiB is too small for long completions.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = (cells for cells in reader if cells)
        names = _header(next(lines, list[str]()))
        for number, cells in enumerate(lines, start=1):
            if len(cells) != len(names):
                raise UsageError(
                    f"line {reader.line_num}: the row has {len(cells)} cells and the header {len(names)}; "
                    f"put a cell that contains {delimiter!r} in double quotes"
                )
            yield number, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise UsageError(
            f"line {reader.line_num}: invalid CSV ({error}); put a cell that contains a double quote in "
            "double quotes, and write each quote in it twice"
        ) from error


def _header(cells: list[str]) -> list[str]:
    # A column without a name, such as the index that pandas writes, gets the name that pandas gives it.
    names = [cell.strip() or f"Unnamed: {index}" for index, cell in enumerate(cells)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"line 1: duplicate column '{name}'; rename or remove one of them")
    return names


def _list_items(text: str) -> Iterator[NumberedRow]:
    """The items of the list that is the whole text, decoded one by one so that an error names the row."""
    position, number = _skip(text, text.index("[") + 1), 0
    closed = text.startswith("]", position)
    try:
        while not closed:
            number += 1
            value, position = _DECODER.raw_decode(text, position)
            yield number, value
            position = _skip(text, position)
            closed = text.startswith("]", position)
            if not closed:
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip(text, position + 1)
        if _skip(text, position + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, position + 1)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"row {number}: invalid JSON ({error})") from error


def _skip(text: str, position: int) -> int:
    """The position after the white space that begins at `position`."""
    match = _WHITE_SPACE.match(text, position)
    return match.end() if match else position


def _is_one_object_on_several_lines(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict) and "\n" in text.strip()
    except (ValueError, RecursionError):
        return False


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key '{duplicate:.80}'")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text:.80} is too large; write it as text")
    return number


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON; write null for a missing value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_no_constant)
