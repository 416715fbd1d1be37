"""Read rows from files or the Hub."""

import contextlib
import glob
import gzip
import os
import re
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uniapl.config import DataConfig
from uniapl.data.formats import CHAT_COLUMNS
from uniapl.data.parsing import NumberedRow, parse_csv, parse_json, parse_json_lines
from uniapl.errors import UsageError
from uniapl.untyped import is_dict, is_list

TEXT_TYPES = tuple(kind + packed for packed in ("", ".gz") for kind in (".jsonl", ".json", ".csv", ".tsv"))
FILE_TYPES = (*TEXT_TYPES, ".parquet")
"""Endings of the names of files that are read without the Hub."""


class Rows(list[NumberedRow]):
    """(number, row) pairs with the files or the dataset that they come from.

    Numbers begin at 1 and are those of the lines in a .jsonl file. Those of a further file continue after the
    last number of the file before it.
    """

    def __init__(self, sources: Iterable[tuple[str, Iterable[NumberedRow]]]) -> None:
        super().__init__()
        self.starts: list[tuple[int, str]] = []
        """(last number before a source, its name)."""
        for source, rows in sources:
            before = self[-1][0] if self else 0
            self.starts.append((before, source))
            self.extend((before + number, row) for number, row in rows)
            if not self or self[-1][0] == before:
                raise UsageError(f"{source}: the data has no rows")

    @property
    def notes(self) -> list[str]:
        """How the rows of several files are numbered; empty for one file."""
        starts = [f"{source} from {before + 1}" for before, source in self.starts]
        shown = ", ".join(starts[:10]) + (", ..." if len(starts) > 10 else "")
        return [f"rows of {len(starts)} files are numbered in one sequence: {shown}"] if starts[1:] else []

    def place(self, number: int) -> tuple[str, int]:
        """The source of a row, and the row's number in it."""
        before, source = next(start for start in reversed(self.starts) if start[0] < number)
        return source, number - before


@contextlib.contextmanager
def named_source(rows: Iterable[NumberedRow]) -> Generator[None]:
    """Prefix errors about rows with the file of the row; those about rows from Python remain unchanged."""
    try:
        yield
    except UsageError as error:
        found = re.match(r"row (\d+)", str(error))
        if not isinstance(rows, Rows) or not (found or str(error).startswith("no usable row")):
            raise
        if not found:
            raise UsageError(f"{', '.join(name for _, name in rows.starts[:3])}: {error}") from error
        source, number = rows.place(int(found[1]))
        raise UsageError(f"{source}: row {number}{str(error)[found.end() :]}") from error


def read_rows(config: DataConfig) -> Rows:
    """Read the rows of `config.path`, with the values as the files have them.

    JSON and CSV are not read with `datasets`: its columns have one type, which changes numbers and dates and
    forbids to mix plain and chat prompts, and its errors do not name the line.

    Raises:
        UsageError: A file or the Hub data set does not exist, is invalid, or has no rows.
    """
    paths = [config.path] if isinstance(config.path, str) else [*(config.path or ())]
    if not paths:
        raise UsageError(f"no data: set data.path to {_KINDS} or a Hub id")
    files: list[str] = []
    for path in paths:
        found = _files_of(path)
        if not found and len(paths) > 1:
            raise UsageError(f"data.path: file not found: '{path}' (a list can only contain files)")
        files += found
    for file in files:
        if files.count(file) > 1:
            raise UsageError(f"data.path: '{file}' occurs more than once; name each file once")
    if not files:
        return _load_dataset(paths[0], config)
    return Rows((file, _read_file(file, file, config)) for file in files)


def is_hub_dataset(path: str) -> bool:
    """Whether an entry of `data.path` is the id of a Hub dataset, not a file, a pattern or a directory."""
    return not (os.path.exists(path) or glob.has_magic(path) or _is_path(path))


def number_rows(rows: Iterable[Mapping[str, Any]], config: DataConfig) -> list[NumberedRow]:
    """Number rows that are given in Python, from 1."""
    datasets: Any = sys.modules.get("datasets")  # A dataset cannot exist before its library is imported.
    if datasets and isinstance(rows, (datasets.Dataset, datasets.IterableDataset)):
        rows = _plain(rows, config)
    return list(enumerate(rows, start=1))


_KINDS = "a .jsonl, .json, .csv, .tsv or .parquet file (.gz for compressed text), a list or pattern of files"


def _files_of(path: str) -> list[str]:
    """The files that a path or pattern names; none for a directory or a Hub id.

    Raises:
        UsageError: A file does not exist or has an unknown type.
    """
    if os.path.isdir(path):
        return []
    # os.path.isfile also accepts names that are too long for a file, unlike Path.is_file.
    files = [path] if os.path.isfile(path) else []
    if not files and glob.has_magic(path):
        files = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not files:
            raise UsageError(f"data.path: no file matches '{path}'")
    for file in files:
        if not file.endswith(FILE_TYPES):
            raise UsageError(f"data.path: '{file}' must end in {', '.join(FILE_TYPES)}")
    # Asking the Hub for a path would take minutes of retries.
    if not files and _is_path(path):
        raise UsageError(f"data.path: file not found: '{path}'")
    return files


def _is_path(path: str) -> bool:
    # A Hub id has at most one slash.
    return path.endswith(FILE_TYPES) or os.path.isabs(path) or path.startswith(".") or path.count("/") > 1


def _read_file(path: str, name: str, config: DataConfig) -> Iterator[NumberedRow]:
    """The rows of a file whose type is the ending of `name`, which errors name."""
    try:
        if name.endswith(".parquet"):
            yield from enumerate(_pruned(_read_parquet(path), config), start=1)
            return
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8-sig")
        kind = Path(name.removesuffix(".gz")).suffix
        if kind in (".csv", ".tsv"):
            yield from parse_csv(text, "\t" if kind == ".tsv" else ",")
        else:
            yield from parse_json_lines(text) if kind == ".jsonl" else parse_json(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: invalid UTF-8 ({error}); convert it, e.g. with iconv") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{name}: invalid gzip data ({error}); compress the file again") from error
    except OSError as error:
        raise UsageError(f"data.path: cannot read '{name}': {error}") from error


def _read_parquet(path: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        # read_table would add columns from directories that are called name=value.
        table = pyarrow.parquet.ParquetFile(path).read()
        for name in table.column_names:
            if table.column_names.count(name) > 1:
                raise UsageError(f"duplicate column '{name}'; rename or remove one of them")
        yield from table.to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"cannot load the file: {error}") from error


def _load_dataset(path: str, config: DataConfig) -> Rows:
    """The rows of a Hub dataset, or of a directory in the form of one or written by `save_to_disk`."""
    import datasets

    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            loaded: Any = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[config.split]
        else:
            loaded = datasets.load_dataset(path, config.name, split=config.split, revision=config.revision)
            if loaded.info.builder_name in ("csv", "json") and (files := _text_files(path, config)):
                local: Any = datasets.DownloadManager().download(files)
                pairs = zip(files, local, strict=True)
                rows = Rows((name, _read_file(file, name, config)) for name, file in pairs)
                split = {config.split.partition("[")[0]: len(rows)}
                [part] = datasets.ReadInstruction.from_spec(config.split).to_absolute(split)
                rows[:] = rows[part.from_ : part.to]
                return rows
    except UsageError:
        raise
    except Exception as error:  # the readers and the Hub client raise many types
        # The message of `datasets` does not contain the reason, which is in the cause.
        reason = " ".join(str(error.__cause__ or error).split("Example of usage")[0].split()).rstrip(".")
        remedy = next((f"; {remedy}" for text, remedy in _REMEDIES.items() if text in reason), "")
        raise UsageError(f"data.path: cannot load '{path}': {reason}{remedy}") from error
    return Rows([(path, enumerate(_plain(loaded, config), start=1))])


_REMEDIES = {
    "Config name is missing": "set data.name to one of them",
    "BuilderConfig '": "set data.name to one of them",
    "Unknown split": "set data.split to one of them",
}
"""Part of a message of `datasets` -> the remedy."""


def _text_files(path: str, config: DataConfig) -> list[str]:
    """The files of a dataset of CSV or JSON files, which `datasets` would not read as they are written.

    None if they can only be read with the dataset's own options, or if several splits are named.
    """
    import datasets

    options: Any = datasets.load_dataset_builder(path, config.name, revision=config.revision).config
    of_splits: Mapping[str, Sequence[str]] = options.data_files or {}
    files = of_splits.get(config.split.partition("[")[0], ())
    keys = ("name", "version", "data_dir", "data_files", "description")
    default = type(options)(**{key: getattr(options, key) for key in keys})
    plain = options.__dict__ == default.__dict__
    readable = plain and all(str(file).endswith(TEXT_TYPES) for file in files)
    return [str(file) for file in files] if readable else []


def _plain(dataset: Any, config: DataConfig) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as Python values, also if its format is that of numpy or torch."""
    return _pruned(dataset.with_format(None), config)


def _pruned(rows: Iterable[dict[str, Any]], config: DataConfig) -> Iterator[dict[str, Any]]:
    """Rows of Arrow data without the None values in the structs of chats and tools.

    All structs of a column have the same fields: Arrow fills the fields that only some of them have.
    """
    chats = {*CHAT_COLUMNS, *(name for name, new in config.columns.items() if new in CHAT_COLUMNS)}
    for row in rows:
        yield {name: _without_none(value) if name in chats else value for name, value in row.items()}


def _without_none(value: Any) -> Any:
    if is_dict(value):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if is_list(value) else value
