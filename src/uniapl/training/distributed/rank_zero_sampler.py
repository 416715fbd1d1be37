"""A sampler that only rank 0 calls: it sends the weights once and reports failures to every rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import gather_object

from uniapl.rollout import SampleRequest
from uniapl.rollout.settings import SamplingSettings
from uniapl.rollout.vllm import VLLMSampler
from uniapl.training.distributed.ranks import on_rank_zero
from uniapl.types import Rollout

Groups = list[tuple[Rollout, ...]]


@dataclass(kw_only=True)
class RankZeroSampler:
    """A sampler that all ranks call together, each with its own prompts."""

    sampler: VLLMSampler
    accelerator: Accelerator

    def check(self) -> None:
        """Send weights and sample the canary. See :class:`VLLMSampler`."""
        on_rank_zero(self.accelerator, self.sampler.check)

    def sample(self, request: SampleRequest) -> Groups:
        """Return the rollouts of this rank's prompts. See :class:`Sampler`."""
        return self._sample(request, self.sampler.sample)

    def evaluate(self, request: SampleRequest, settings: SamplingSettings) -> Groups:
        """:meth:`sample` with the settings of evaluation."""
        return self._sample(request, lambda everything: self.sampler.sample_with(everything, settings))

    def _sample(self, request: SampleRequest, sample: Callable[[SampleRequest], Groups]) -> Groups:
        requests = gather_object([request])
        groups = on_rank_zero(self.accelerator, lambda: sample(merged(requests)))
        start = sum(len(other.prompts) for other in requests[: self.accelerator.process_index])
        return groups[start : start + len(request.prompts)]


def merged(requests: list[SampleRequest]) -> SampleRequest:
    """One request with the prompts of all ranks."""
    return replace(
        requests[0],
        prompts=[prompt for request in requests for prompt in request.prompts],
        seeds=[seed for request in requests for seed in request.seeds],
    )
