"""Metrics sent to a tracker beside metrics.jsonl: what `report_to` names, through accelerate."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uniapl.config.resolve import Resolved, flatten
from uniapl.errors import UsageError


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UsageError: Naming it and what to install.
    """
    for name in names:
        # Each is called like its package.
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"report_to: '{name}' is not installed: pip install {name}")


@contextlib.contextmanager
def tracked(accelerator: Accelerator, resolved: Resolved) -> Iterator[None]:
    """Open the trackers with the run's name and its values, and close them however the run ends."""
    config = resolved.config
    if not config.report_to:
        yield
        return
    values = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flatten(config).items()
    }
    name = Path(config.output_dir).name
    kwargs = {"wandb": {"name": name}, "trackio": {"name": name}}
    accelerator.init_trackers(
        "uniapl", values, {key: value for key, value in kwargs.items() if key in config.report_to}
    )
    try:
        yield
    finally:
        # Not accelerate's end_training, which takes the processes' group with it.
        for tracker in accelerator.trackers:
            tracker.finish()


def track(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Send a step's numbers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    accelerator.log(numbers, step=record["step"])
