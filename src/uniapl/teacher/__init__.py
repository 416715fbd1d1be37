"""Teachers: stronger models whose log-probabilities of the policy's completions are learned from."""

from collections.abc import Sequence
from typing import Protocol

from uniapl.types import MicroBatch


class Teacher(Protocol):
    """Gives log-probabilities of the policy's completions."""

    def read(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the micro-batches with `teacher_logprobs`, and with `teacher_ids` if these are of the
        teacher's most likely tokens; both are 0 outside `rollout_mask`.

        Raises:
            UniAPLError: The teacher failed.
        """
        ...
