"""The best checkpoint of a run: the file that names it, and its model as the result."""

import fnmatch
import json
import shutil
from pathlib import Path

from uniapl.files import write_text
from uniapl.report.reading import BEST
from uniapl.training.checkpoint.directory import (
    MANIFEST,
    STATE,
    best_step,
    checkpoint_path,
    defects,
    listed_files,
)
from uniapl.training.monitor.early_stopping import Stopping

ONLY_FOR_RESUMING = (MANIFEST, STATE, "*_optimizer.*", "discriminator.safetensors", "reference.safetensors")
"""Files of a checkpoint that are not part of the model."""


def name_best(run_dir: Path, stopping: Stopping, metric: str) -> None:
    """Write which checkpoint is the best one; delete the file if there is none."""
    step = stopping.best_step
    if step is None:
        (run_dir / BEST).unlink(missing_ok=True)
    elif step != best_step(run_dir):
        path = checkpoint_path(run_dir, step).relative_to(run_dir)
        found = {"step": step, "checkpoint": str(path), "metric": metric, "value": stopping.best_value}
        write_text(run_dir / BEST, json.dumps(found))


def check_best(run_dir: Path, stopping: Stopping, *, verified: Path | None) -> str | None:
    """Forget a best checkpoint that cannot be used; return the note about it.

    Args:
        verified: A checkpoint whose checksums are known to be right.
    """
    step = stopping.best_step
    if step is None:
        return None
    path = checkpoint_path(run_dir, step)
    if (verified is not None and path.resolve() == verified.resolve()) or not (found := defects(path)):
        return None
    stopping.best_step = stopping.best_value = None
    return (
        f"the best checkpoint so far, of step {step}, cannot be used ({found[0]}): the comparison of "
        "load_best_model_at_end starts again"
    )


def copy_model(checkpoint: Path, directory: Path) -> None:
    """Copy the model of a checkpoint with its tokenizer."""
    shutil.copytree(
        checkpoint, directory, ignore=shutil.ignore_patterns(*ONLY_FOR_RESUMING), dirs_exist_ok=True
    )


def model_files(directory: Path) -> list[str]:
    """The names of the files in a directory's manifest that are part of the model; [] without a manifest."""
    names = listed_files(directory)
    return [
        name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ONLY_FOR_RESUMING)
    ]
