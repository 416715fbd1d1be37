"""A sampler for a model that a vLLM server has: its weights are compared and never changed."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from uniapl.errors import UniAPLError, UsageError
from uniapl.rollout import SampleRequest
from uniapl.rollout.engines import Server
from uniapl.rollout.settings import SamplingSettings
from uniapl.rollout.vllm import CANARY_TOKENS, Turns, canary_difference, until_done
from uniapl.types import Rollout, TokenIds


@dataclass(kw_only=True)
class ServedModel:
    """Samples from a server that was started with the model. See :class:`uniapl.rollout.Sampler`.

    The server needs none of its development endpoints and may be on another machine.
    """

    engine: Server
    settings: SamplingSettings
    model: PreTrainedModel
    """The model that the server must have; it only scores the canary."""
    canary: Sequence[TokenIds]
    """Prompts of the canary."""
    tolerance: float
    """Largest mean difference between the log-probabilities of server and model, in nats per token."""
    difference: float | None = None
    """The measured difference; None if the server was not compared, or was lost since."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return `num_generations` rollouts for each prompt; a server that was lost is compared again.

        Raises:
            UniAPLError: The server does not come back, returns malformed completions or has another model.
        """
        turns = Turns(engine=self.engine, settings=self.settings)

        def attempt() -> list[tuple[Rollout, ...]]:
            self._compare()
            return turns.sample(request)

        return until_done(attempt, self._forget)

    def check(self) -> None:
        """Compare the server with the model.

        Raises:
            UsageError: The server is not available or has another model.
        """
        try:
            until_done(self._compare, self._forget)
        except UniAPLError as error:
            raise UsageError(str(error)) from error

    def _forget(self) -> None:
        self.difference = None

    def _compare(self) -> None:
        if self.difference is not None:
            return
        self.engine.wait()
        # At temperature 1 and without truncation, every --logprobs-mode gives the same numbers.
        settings = SamplingSettings(
            max_completion_length=min(CANARY_TOKENS, self.settings.max_completion_length), stop_ids=()
        )
        found = canary_difference(
            self.engine, self.canary, self.model, settings, autocast=contextlib.nullcontext
        )
        # `found > tolerance` would accept NaN.
        if not found <= self.tolerance:
            raise UniAPLError(
                f"the vLLM server {self.engine.url}, started with '{self.engine.model()}', has another "
                f"model: its log-probabilities differ by {found:.2g} nats per token on average, and "
                f"rollout.vllm_max_logp_difference is {self.tolerance:g}. Start `vllm serve` with the model "
                "that is evaluated (`uniapl export` merges an adapter); if it is that model, --dtype float32 "
                "makes the difference smaller"
            )
        self.difference = found
