"""Errors of the machine, said as a user can use them: what failed, and how to go on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size

from uniapl.errors import UniAPLError, UsageError
from uniapl.training.checkpoint import directory as checkpoint
from uniapl.training.monitor.console import RunView

OUT_OF_MEMORY = {
    "rollout": "rollout.max_batch_size or rollout.max_completion_length",
    "score": "batching.max_tokens_per_micro_batch",
    "evaluate": "rollout.max_batch_size or evaluation.max_completion_length",
}
"""Phase -> what to lower where it does not fit; an update cuts itself smaller before it gives up."""


@contextlib.contextmanager
def disk_errors_explained(directory: Path, *, started: bool) -> Iterator[None]:
    """A disk that is full, read-only or broken ends the run with one message, not with a traceback.

    Raises:
        UsageError: Before its first step.
        UniAPLError: Later; it says from where the run can go on.
    """
    try:
        yield
    except BrokenPipeError:
        # Nobody reads the console any more: that is the command line's to answer.
        raise
    except OSError as error:
        if not started:
            raise UsageError(f"output_dir '{directory}' cannot be written: {error}") from error
        whole = (path for path in reversed(checkpoint.checkpoints(directory)) if not checkpoint.defects(path))
        last = next(whole, None)
        remedy = f"goes on from {last}" if last else "starts it anew: no checkpoint was saved yet"
        raise UniAPLError(
            f"the run in '{directory}' failed: {error}. Once that is mended, --resume auto {remedy}"
        ) from error


@contextlib.contextmanager
def memory_errors_explained(view: RunView) -> Iterator[None]:
    """Out of memory, outside an update: what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        remedy = OUT_OF_MEMORY.get(view.current, "a smaller model or shorter answers")
        raise UniAPLError(
            f"out of memory ({view.current}): {error}. Lower {remedy}; --resume auto goes on from the last "
            "checkpoint"
        ) from error
