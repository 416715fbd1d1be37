"""Read the files of a run directory; incomplete last lines are ignored."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from uniapl.config.resolve import load_recipe
from uniapl.errors import UsageError
from uniapl.report.analysis import mean, number

Record = dict[str, Any]

MAX_BYTES = 50_000_000
"""Bytes of completions.jsonl that are read: the file may exceed the memory, and a page shows less."""
MODEL_ANALYSIS = "analysis.json"
END_STATE = "ending.json"
MEASUREMENTS = "measurements.json"
"""What the demo measured: {"title", "models": [name], "rows": [{"name", "meaning", "values": [text]}]}."""
BEST = "best.json"
"""Names the checkpoint whose model is the result (load_best_model_at_end)."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The contents of a run directory."""

    directory: Path
    config: Record
    """config.yaml."""
    manifest: Record
    """manifest.json; empty if it does not exist."""
    metrics: list[Record]
    """metrics.jsonl with two more metrics, `expert/mean_length` and `seconds` (since the start)."""
    completions: list[Record] = field(default_factory=list)
    """completions.jsonl, one record per prompt and step; every `stride`-th one of a large file."""
    stride: int = 1
    warnings: list[Record] = field(default_factory=list)
    """health.jsonl: {"step", "rule", "message"}, one whenever a rule starts to fire."""
    files: dict[str, Record | None] = field(default_factory=dict[str, "Record | None"])
    """Content of the files that only some runs have, by name."""

    @property
    def end_state(self) -> Record | None:
        """{"state": "finished" | "stopped" | "interrupted", "message"}; None while it runs, and after a
        kill."""
        return self.files.get(END_STATE)

    @property
    def models(self) -> Record | None:
        """analysis.json, written by `uniapl report --model-analysis`."""
        return self.files.get(MODEL_ANALYSIS)

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.directory.resolve().name

    @property
    def methods(self) -> list[str]:
        """The method of each stage."""
        return [stage["method"] for stage in self.config.get("stages") or [self.config]]

    @property
    def planned_steps(self) -> int:
        """The steps of all stages."""
        return sum(stage["max_steps"] for stage in self.config.get("stages") or [self.config])

    @property
    def steps(self) -> list[int]:
        """The steps that have metrics."""
        return [record["step"] for record in self.metrics]

    def series(self, key: str) -> list[float | int | None]:
        """The value of a metric at each step; None if it is missing or not finite."""
        return [number(record.get(key)) for record in self.metrics]

    def keys(self, prefix: str) -> list[str]:
        """The metrics that begin with `prefix` and have values, in the order of their first appearance."""
        found = {key: None for record in self.metrics for key in record if key.startswith(prefix)}
        return [key for key in found if any(value is not None for value in self.series(key))]


def step_phases(run: RunData) -> dict[str, str]:
    """The metrics with the seconds of each phase that took at least 1 % of the time, and their phases."""
    keys = [key for key in run.keys("time/") if not key.startswith("time/rewards/")]
    spent = {key: sum(value or 0.0 for value in run.series(key)) for key in keys}
    total = sum(spent.values())
    return {key: key.removeprefix("time/") for key, seconds in spent.items() if seconds >= 0.01 * total}


def read_run(directory: Path, *, max_bytes: int = MAX_BYTES) -> RunData:
    """Read a run directory.

    Args:
        max_bytes: Bytes of completions.jsonl to read; a larger file is sampled evenly by lines.

    Raises:
        UsageError: The directory holds no run, no step yet, or a damaged file.
    """
    if not (directory / "metrics.jsonl").is_file() or not (directory / "config.yaml").is_file():
        raise UsageError(
            f"'{directory}' is not a run directory (metrics.jsonl or config.yaml is missing): give the "
            "--output-dir of uniapl train"
        )
    metrics = _records(directory / "metrics.jsonl")
    if not metrics:
        raise UsageError(f"'{directory / 'metrics.jsonl'}' has no complete step yet: nothing to report")
    config = load_recipe(directory / "config.yaml")
    if missing := [key for key in ("method", "max_steps", "model") if key not in config]:
        raise UsageError(f"'{directory / 'config.yaml'}' was not written by training: it has no {missing[0]}")
    path = directory / "completions.jsonl"
    stride = max(1, -(-path.stat().st_size // max_bytes)) if path.is_file() else 1
    completions = _records(path, stride)
    for count, record in enumerate(completions, start=1):
        if not record.get("completions"):
            raise UsageError(f"'{path}': record {count} has no completions")
    _derive(metrics, completions)
    return RunData(
        directory=directory,
        config=config,
        manifest=_read_json(directory / "manifest.json") or {},
        metrics=metrics,
        completions=completions,
        stride=stride,
        warnings=_records(directory / "health.jsonl"),
        files={
            name: _read_json(directory / name, *keys)
            for name, keys in {
                END_STATE: (),
                MODEL_ANALYSIS: (),
                BEST: ("step",),
                MEASUREMENTS: ("title", "models", "rows"),
            }.items()
        },
    )


def _derive(metrics: Iterable[Record], completions: Iterable[Record]) -> None:
    """Add the demonstrations' mean length and the time since the start to the metrics."""
    lengths: dict[int, list[int]] = {}
    for record in completions:
        if record.get("demonstration_tokens") is not None:
            lengths.setdefault(record["step"], []).append(record["demonstration_tokens"])
    seconds = 0.0
    for record in metrics:
        seconds += sum(number(record.get(key)) or 0.0 for key in ("step_time", "time/evaluate"))
        record |= {"expert/mean_length": mean(lengths.get(record["step"], [])), "seconds": seconds}


def _complete_lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from (line for line in file if line.endswith("\n"))


def _records(path: Path, stride: int = 1) -> list[Record]:
    """Every `stride`-th record of a file, which need not exist."""
    records: list[Record] = []
    for count, line in enumerate(islice(_complete_lines(path), 0, None, stride), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it is not an object with a step")
        except ValueError as error:
            raise UsageError(f"cannot read '{path}', record {count}: {error}") from error
        records.append(record)
    return records


def _read_json(path: Path, *keys: str) -> Record | None:
    """The object in a file, which must have the keys; None if there is no file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it has no '{missing[0]}'")
    except ValueError as error:
        raise UsageError(f"cannot read '{path}': {error}; delete or repair it") from error
    return found
