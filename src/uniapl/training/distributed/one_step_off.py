"""One step off-policy: the next step's rollouts are sampled while the current step trains.

They come from the weights before the current update and are trained on after it. They keep the sampling
log-probabilities of those weights, and the importance weights correct for the difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate.utils import gather_object

from uniapl.rollout import SampleRequest
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.distributed.rank_zero_sampler import Groups, RankZeroSampler, merged
from uniapl.training.distributed.ranks import on_rank_zero
from uniapl.types import Rollout, TokenIds, ToolUse

Key = tuple[TokenIds, int]
"""A prompt and its seed; no other prompt of the run has both, for any number of ranks."""


@dataclass(kw_only=True)
class OneStepOffSampler(RankZeroSampler):
    """A sampler that can start the next step's rollouts early; all ranks call it together."""

    ready: dict[Key, tuple[Rollout, ...]] = field(default_factory=dict)
    """Finished rollouts for the next step, of all ranks."""
    _pending: SampleRequest | None = None
    """The prompts of all ranks that are being sampled in the background."""
    _result: Callable[[], list[tuple[Rollout, ...]] | None] | None = None
    """Waits for their rollouts (rank 0 only)."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return this rank's rollouts: those begun for these prompts and seeds if complete, or new ones."""
        self.wait()
        groups = [self.ready.get(key, ()) for key in _keys(request)]
        self.ready = {}
        # Some are missing after a resume with another recipe, or if vLLM was lost while it sampled them.
        complete = all(len(group) == request.num_generations for group in groups)
        return groups if all(gather_object([complete])) else super().sample(request)

    def evaluate(self, request: SampleRequest, settings: SamplingSettings) -> Groups:
        """See :meth:`RankZeroSampler.evaluate`; vLLM first finishes the next step's rollouts."""
        self.wait()
        return super().evaluate(request, settings)

    def begin(self, request: SampleRequest) -> None:
        """Send the weights and start sampling in the background, for a later :meth:`sample`."""
        everything = merged(gather_object([request]))

        def begin() -> None:
            self._result = self.sampler.begin(everything)

        on_rank_zero(self.accelerator, begin)
        self._pending = everything

    def wait(self) -> None:
        """Wait for the rollouts that were begun, if any; none arrive if vLLM was lost."""
        if self._pending is None:
            return
        request, self._pending = self._pending, None
        groups = on_rank_zero(self.accelerator, lambda: self._result() if self._result else None)
        if groups is not None:
            self.ready |= zip(_keys(request), groups, strict=True)

    def state(self) -> list[dict[str, Any]]:
        """Return the finished rollouts as JSON values."""
        return [
            {
                "prompt_ids": prompt,
                "seed": seed,
                "rollouts": [asdict(rollout) for rollout in group],
                "settings": self.sampler.settings.as_json(),
            }
            for (prompt, seed), group in self.ready.items()
        ]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restore :meth:`state`, except for rollouts that were sampled with other settings."""
        self.ready = {
            (tuple(entry["prompt_ids"]), entry["seed"]): tuple(map(_rollout, entry["rollouts"]))
            for entry in state
            if entry.get("settings") == self.sampler.settings.as_json()
        }


def _keys(request: SampleRequest) -> list[Key]:
    return list(zip(request.prompts, request.seeds, strict=True))


def _rollout(values: Mapping[str, Any]) -> Rollout:
    lists = {
        name: tuple(values.get(name, ())) for name in ("completion_ids", "sampling_logprobs", "messages")
    }
    given = tuple((start, stop) for start, stop in values.get("given", ()))
    use = ToolUse(**values.get("tool_use", {}))
    return Rollout(**{**values, **lists, "given": given, "tool_use": use})
