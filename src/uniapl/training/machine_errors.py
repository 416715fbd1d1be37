"""Explain errors of the machine: what failed, and how to continue."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size

from uniapl.errors import UniAPLError, UsageError
from uniapl.training.checkpoint import directory as checkpoint_directory
from uniapl.training.monitor.console import RunView

OUT_OF_MEMORY = {
    "rollout": "rollout.max_batch_size or rollout.max_completion_length",
    "score": "batching.max_tokens_per_micro_batch",
    "evaluate": "rollout.max_batch_size or evaluation.max_completion_length",
}
"""Phase -> keys to lower if it runs out of memory; updates split their micro-batches instead."""


@contextlib.contextmanager
def disk_errors_explained(directory: Path, *, started: bool) -> Iterator[None]:
    """A full, read-only or broken disk ends the run with one message instead of a traceback.

    Raises:
        UsageError: An OSError before the first step.
        UniAPLError: A later one; the message names the checkpoint to continue from.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of the console is gone, which the command line handles.
        raise
    except OSError as error:
        if not started:
            raise UsageError(f"output_dir '{directory}' cannot be written: {error}") from error
        complete = (
            path
            for path in reversed(checkpoint_directory.checkpoints(directory))
            if not checkpoint_directory.defects(path)
        )
        last = next(complete, None)
        remedy = (
            f"continue from {last} with --resume auto" if last else "start again; no checkpoint was saved"
        )
        raise UniAPLError(f"the run in '{directory}' failed: {error}. Fix the cause and {remedy}") from error


@contextlib.contextmanager
def memory_errors_explained(view: RunView) -> Iterator[None]:
    """Running out of memory outside an update ends the run with a message that names the keys to lower."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        remedy = OUT_OF_MEMORY.get(view.current, "the size of the model or the length of completions")
        raise UniAPLError(
            f"out of memory ({view.current}): {error}. Lower {remedy} and continue from the last checkpoint "
            "with --resume auto"
        ) from error
