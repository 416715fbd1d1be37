"""Experiment trackers: metrics go to those that `report_to` names, through accelerate."""

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
        UsageError: The tracker's package is missing.
    """
    # Each tracker has the name of its package.
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"report_to: '{name}' is not installed: pip install {name}")


@contextlib.contextmanager
def tracked(accelerator: Accelerator, resolved: Resolved) -> Iterator[None]:
    """Open the trackers with the run's name and configuration, and close them when the run ends."""
    config = resolved.config
    if not config.report_to:
        yield
        return
    values = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flatten(config).items()
    }
    named = {"name": Path(config.output_dir).name}
    options = {key: named for key in ("wandb", "trackio") if key in config.report_to}
    accelerator.init_trackers("uniapl", values, options)
    try:
        yield
    finally:
        # accelerate's end_training would also destroy the process group.
        for tracker in accelerator.trackers:
            tracker.finish()


def track(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Log a step's numbers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    accelerator.log(numbers, step=record["step"])
