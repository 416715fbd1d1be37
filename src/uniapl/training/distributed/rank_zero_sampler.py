"""A sampler that only rank 0 calls: it sends the weights once and reports failures to every rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from uniapl.errors import UniAPLError
from uniapl.rollout import SampleRequest
from uniapl.rollout.vllm import VLLMSampler
from uniapl.types import Rollout

Result = TypeVar("Result")


@dataclass(kw_only=True)
class RankZeroSampler:
    """A sampler that all ranks call together, each with its own prompts."""

    sampler: VLLMSampler
    accelerator: Accelerator

    def check(self) -> None:
        """Send weights and sample the canary. See :class:`VLLMSampler`."""
        self._on_rank_zero(self.sampler.check)

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return the rollouts of this rank's prompts. See :class:`Sampler`."""
        requests = gather_object([request])
        groups = self._on_rank_zero(lambda: self.sampler.sample(merged(requests)))
        start = sum(len(other.prompts) for other in requests[: self.accelerator.process_index])
        return groups[start : start + len(request.prompts)]

    def _on_rank_zero(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0; every rank returns its result or raises its UniAPLError."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [work()]
            except UniAPLError as error:
                outcome = [error]
        (result,) = broadcast_object_list(outcome)
        if isinstance(result, UniAPLError):
            raise result
        return result


def merged(requests: list[SampleRequest]) -> SampleRequest:
    """One request with the prompts of all ranks."""
    return replace(
        requests[0],
        prompts=[prompt for request in requests for prompt in request.prompts],
        seeds=[seed for request in requests for seed in request.seeds],
    )
