"""Experiment trackers: metrics go to those that `report_to` names, through accelerate."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uniapl.config import Config
from uniapl.config.resolve import Resolved, flatten
from uniapl.errors import UniAPLError, UsageError
from uniapl.training.distributed.ranks import on_rank_zero

PROJECT = "uniapl"
"""Project of the runs in wandb and trackio, experiment in mlflow, and directory of TensorBoard's files."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UsageError: The tracker's package is missing.
    """
    # Each tracker has the name of its package.
    for name in names:
        spec = importlib.util.find_spec(name)
        # wandb writes to a directory ./wandb, which Python finds as a package without a file.
        if spec is None or spec.origin is None:
            raise UsageError(f"report_to: '{name}' is not installed: pip install {name}")


@contextlib.contextmanager
def tracked(accelerator: Accelerator, resolved: Resolved, say: Callable[[str], None]) -> Iterator[None]:
    """Open the trackers with the run's name and configuration, and close them when the run ends.

    A tracker that does not close is reported with `say` and does not fail the run.

    Raises:
        UniAPLError: A tracker does not start.
    """
    config = resolved.config
    if not config.report_to:
        yield
        return
    values = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flatten(config).items()
    }

    def start() -> None:
        try:
            accelerator.init_trackers(PROJECT, values, _options(config))
        except Exception as error:  # each tracker raises its own types
            raise UniAPLError(
                f"report_to: {', '.join(config.report_to)} did not start: {_reason(error)}. Correct its "
                "settings or remove it from report_to, and continue with --resume auto"
            ) from error

    on_rank_zero(accelerator, start)
    try:
        yield
    finally:
        # accelerate's end_training would also destroy the process group.
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                say(f"warning: report_to: {tracker.name} did not close: {_reason(error)}")


def _options(config: Config) -> dict[str, dict[str, Any]]:
    """Tracker -> its arguments: the name and the group of the run. TensorBoard has no names of runs."""
    name, group = config.run_name or Path(config.output_dir).name, config.run_group
    named = {"name": name, **({"group": group} if group else {})}
    tagged = {"run_name": name, **({"tags": {"group": group}} if group else {})}
    options = {"wandb": named, "trackio": named, "mlflow": tagged}
    return {tracker: options[tracker] for tracker in config.report_to if tracker in options}


def track(accelerator: Accelerator, record: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Log a step's numbers. A tracker that fails is reported with `say` and gets no more of them."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    for tracker in [*accelerator.trackers]:
        try:
            tracker.log(numbers, step=record["step"])
        except Exception as error:
            accelerator.trackers.remove(tracker)
            say(
                f"step {record['step']}: warning: report_to: {tracker.name} failed and gets no more metrics: "
                f"{_reason(error)}. metrics.jsonl has every step"
            )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
