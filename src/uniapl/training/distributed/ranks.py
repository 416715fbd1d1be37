"""Work that rank 0 does for all ranks, and the inputs on which all ranks must agree."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from uniapl.errors import UniAPLError, UsageError

Result = TypeVar("Result")


def on_rank_zero(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0; every rank returns its result or raises its error. All ranks call it together.

    An error that is no UniAPLError is raised unchanged on rank 0, and as a UniAPLError on the others.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except UniAPLError as error:
            outcome = [error]
        except Exception as error:
            # It may not be picklable.
            failure, outcome = error, [UniAPLError(f"rank 0 failed: {error!r}")]
    (result,) = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if isinstance(result, UniAPLError):
        raise result
    return result


def check_agreement(accelerator: Accelerator, name: str, values: Iterable[object]) -> None:
    """Check that values are the same on every rank: nodes may have different copies of a file.

    Raises:
        UsageError: The reprs of the values differ; every rank raises it.
    """
    if accelerator.num_processes == 1:
        return
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode(errors="backslashreplace"))
    digests = gather_object([digest.hexdigest()])
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UsageError(
            f"{name} of rank {others[0]} differs from that of rank 0: start every process with the same "
            "recipe, flags and files"
        )
