"""Metrics sent to a tracker beside metrics.jsonl: what `report_to` names, through accelerate."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from uniapl.errors import UsageError
from uniapl.resolve import Resolved, flatten

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}
"""Tracker -> what has to be installed for it."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UsageError: Naming it and what to install.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UsageError(f"report_to: '{name}' is not installed: pip install {PACKAGES[name]}")


def start_trackers(accelerator: Accelerator, resolved: Resolved) -> None:
    """Open the trackers with the run's name and its values."""
    config = resolved.config
    if not config.report_to:
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


def track(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Send a step's numbers."""
    numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    accelerator.log(numbers, step=record["step"])
