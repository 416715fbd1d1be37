"""From a run directory to its data: files as they are, half-written last lines left out."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from uniapl.config.resolve import load_recipe
from uniapl.errors import UsageError
from uniapl.report.analysis import mean, number

Record = dict[str, Any]

MOST_BYTES = 50_000_000
"""Of completions.jsonl that are read: a long run's can be larger than memory, and a page shows less."""
MODEL_ANALYSIS = "analysis.json"
ENDING = "ending.json"


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What the files of a run directory say."""

    directory: Path
    config: Record
    """config.yaml."""
    manifest: Record
    """manifest.json; empty where there is none."""
    metrics: list[Record]
    """One per step, in order."""
    completions: list[Record] = field(default_factory=list)
    """One per prompt and step, in order; every `stride`-th one of a file that is too large."""
    stride: int = 1
    warnings: list[Record] = field(default_factory=list)
    """health.jsonl: {"step", "rule", "message"}, one when a rule begins to fire."""
    ending: Record | None = None
    """{"state": "finished" | "stopped" | "interrupted", "message"}; None while it runs, and after a kill."""
    models: Record | None = None
    """analysis.json: what `uniapl report --model-analysis` measured."""

    @property
    def name(self) -> str:
        """The directory's."""
        return self.directory.resolve().name

    @property
    def methods(self) -> list[str]:
        """Of all stages."""
        return [stage["method"] for stage in self.config.get("stages") or [self.config]]

    @property
    def planned_steps(self) -> int:
        """Over all stages."""
        return sum(stage["max_steps"] for stage in self.config.get("stages") or [self.config])

    @property
    def steps(self) -> list[int]:
        """The steps that have metrics."""
        return [record["step"] for record in self.metrics]

    def series(self, key: str) -> list[float | int | None]:
        """A metric at each step."""
        return [number(record.get(key)) for record in self.metrics]

    def has(self, key: str) -> bool:
        """Whether a metric is known at any step."""
        return any(value is not None for value in self.series(key))

    def keys(self, prefix: str) -> list[str]:
        """The metrics that begin with `prefix`, in the order in which they first appear."""
        found = {key: None for record in self.metrics for key in record if key.startswith(prefix)}
        return [key for key in found if self.has(key)]


def read_run(directory: Path, *, most_bytes: int = MOST_BYTES) -> RunData:
    """The run in a directory.

    Args:
        most_bytes: Of completions.jsonl; of a larger file an even sample of the lines is read.

    Raises:
        UsageError: It is none, has no step yet, or a file of it is damaged.
    """
    if not (directory / "metrics.jsonl").is_file() or not (directory / "config.yaml").is_file():
        raise UsageError(
            f"'{directory}' is not the directory of a run (there is no metrics.jsonl with a config.yaml): "
            "give what was --output-dir of uniapl train"
        )
    metrics = _records(directory / "metrics.jsonl")
    if not metrics:
        raise UsageError(f"'{directory / 'metrics.jsonl'}' holds no step: there is nothing to report yet")
    config = load_recipe(directory / "config.yaml")
    if missing := [key for key in ("method", "max_steps", "model") if key not in config]:
        raise UsageError(f"'{directory / 'config.yaml'}' is not what training writes: it has no {missing[0]}")
    path = directory / "completions.jsonl"
    stride = max(1, -(-path.stat().st_size // most_bytes)) if path.is_file() else 1
    completions = _records(path, islice(_stream(path), 0, None, stride))
    for count, record in enumerate(completions, start=1):
        if not record.get("completions"):
            raise UsageError(f"'{path}': record {count} holds no completions")
    return RunData(
        directory=directory,
        config=config,
        manifest=_read_json(directory / "manifest.json") or {},
        metrics=with_derived(metrics, completions),
        completions=completions,
        stride=stride,
        warnings=_records(directory / "health.jsonl"),
        ending=_read_json(directory / ENDING),
        models=_read_json(directory / MODEL_ANALYSIS),
    )


def with_derived(metrics: Sequence[Record], completions: Sequence[Record]) -> list[Record]:
    """The metrics with what follows from them and the completions: the expert's lengths, time so far."""
    expert: dict[int, list[int]] = {}
    for record in completions:
        if record.get("demonstration_tokens") is not None:
            expert.setdefault(record["step"], []).append(record["demonstration_tokens"])
    seconds = 0.0
    result: list[Record] = []
    for record in metrics:
        seconds += number(record.get("step_time")) or 0.0
        derived = {"expert/mean_length": mean(expert.get(record["step"], [])), "seconds": seconds}
        result.append({**record, **derived})
    return result


def _stream(path: Path) -> Iterator[str]:
    """The lines that end, one at a time, of a file that need not be there."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line for line in file if line.endswith("\n"))


def _records(path: Path, lines: Iterable[str] | None = None) -> list[Record]:
    """What the lines of a file say: of all of it, unless some are given."""
    records: list[Record] = []
    for count, line in enumerate(_stream(path) if lines is None else lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it is no object with a step")
        except ValueError as error:
            raise UsageError(f"'{path}': record {count} cannot be read: {error}") from error
        records.append(record)
    return records


def _read_json(path: Path) -> Record | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise UsageError(f"'{path}' cannot be read: {error}; delete it, or mend it") from error
    return found
