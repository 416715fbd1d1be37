"""Read rows from a file or the Hub."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from uniapl.config import DataConfig
from uniapl.errors import UsageError

TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


@contextlib.contextmanager
def named_source(source: str | None) -> Iterator[None]:
    """Prefix errors about rows with the source of the rows; None leaves them unchanged (rows from Python)."""
    try:
        yield
    except UsageError as error:
        if source is None or not str(error).startswith(("row ", "no usable row")):
            raise
        raise UsageError(f"{source}: {error}") from error


def read_rows(config: DataConfig) -> list[tuple[int, Any]]:
    """Read `config.path` into (number, row) pairs, numbered from 1; in a .jsonl file by line.

    JSON is not read with `datasets`: its columns have one type, but a file may mix plain and chat prompts,
    and an error can name the line.

    Raises:
        UsageError: The file or Hub data set does not exist, is invalid, or has no rows.
    """
    if config.path is None:
        raise UsageError("no data: set data.path to a .jsonl, .json, .csv or .parquet file or a Hub id")
    path = Path(config.path)
    # os.path.isfile also accepts names that are too long for a file, unlike Path.is_file.
    exists = os.path.isfile(path)
    if exists and path.suffix not in FILE_TYPES:
        raise UsageError(f"data.path: '{path}' must end in .jsonl, .json, .csv or .parquet")
    if not exists and path.suffix in FILE_TYPES:
        raise UsageError(f"data.path: file not found: '{path}'")
    try:
        if path.suffix == ".jsonl":
            rows = _read_jsonl(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, list):
                raise UsageError(f"{path}: expected a list of rows; use .jsonl for one row per line")
            rows = list(enumerate(content, start=1))
        else:
            rows = list(enumerate(_load_dataset(config, path), start=1))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: invalid UTF-8 ({error}); convert it, e.g. with iconv") from error
    except OSError as error:
        raise UsageError(f"data.path: cannot read '{path}': {error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: invalid JSON ({error})") from error
    if not rows:
        raise UsageError(f"{path}: the file has no rows")
    return rows


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        try:
            if line.strip():
                rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UsageError(f"{path}: line {number}: invalid JSON ({reason})") from error
    return rows


def _load_dataset(config: DataConfig, path: Path) -> Iterable[Mapping[str, Any]]:
    import datasets

    load: Any = datasets.load_dataset
    try:
        if path.suffix == ".csv":
            # Text columns stay text, also 11 and "None"; only an empty cell is missing.
            texts = [*TEXT_COLUMNS, *(name for name, new in config.columns.items() if new in TEXT_COLUMNS)]
            converters = dict.fromkeys(texts, lambda text: text or None)
            options = {"keep_default_na": False, "na_values": [""], "converters": converters}
            return load("csv", data_files=str(path), split="train", **options)
        if path.suffix == ".parquet":
            return load("parquet", data_files=str(path), split="train")
        return load(config.path, split=config.split)
    except Exception as error:  # the readers and the Hub client raise many types
        # The message of `datasets` does not contain the reason, which is in the cause.
        raise UsageError(f"data.path: cannot load '{config.path}': {error.__cause__ or error}") from error
