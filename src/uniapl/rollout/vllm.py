"""The sampler that runs in vLLM, a separate program: it receives the weights of every step.

The weights are written to a directory in the format of transformers and vLLM loads them from there. A canary
then shows that it did: a short completion of vLLM's, whose log-probabilities the trainer computes too.
"""

import math
import shutil
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from uniapl.errors import UniAPLError, UsageError
from uniapl.functional import logprobs_from_logits
from uniapl.models.lora import merged
from uniapl.rollout import SampledTokens, Sampler, SampleRequest
from uniapl.rollout.engines import Colocated, EngineLostError, Server
from uniapl.rollout.settings import SamplingSettings
from uniapl.threads import in_background
from uniapl.types import Rollout, TokenIds
from uniapl.untyped import items_of

Result = TypeVar("Result")

CANARY_TOKENS = 32
"""Largest length of the canary: enough for a mean, and fast. Our choice."""
MAX_RESTARTS = 3
"""How often vLLM may be lost and come back within one step. Our choice."""
BEFORE_TRAINING = -1
"""Version of the weights that are sent by the check before the first step."""


@dataclass(kw_only=True)
class VLLMSampler:
    """Samples with the weights of the requested policy version, which it sends to vLLM."""

    engine: Colocated | Server
    model: PreTrainedModel
    """The policy: its weights are sent, and it scores the canary."""
    autocast: Callable[..., AbstractContextManager[Any]]
    """Training's precision context; the weights are sent in its precision."""
    directory: Path
    """Directory for the weights while vLLM loads them; a server must see it under the same path."""
    canary: TokenIds
    """Prompt of the canary."""
    tolerance: float
    """Largest mean difference between vLLM's and the trainer's log-probabilities, in nats per token."""
    settings: SamplingSettings
    with_tools: Callable[[Sampler, int], Sampler] = lambda turns, max_completion_length: turns
    """Returns a sampler of rollouts that call tools, from one of single turns and the maximum number of
    tokens; by default a rollout is one turn. If vLLM is lost, the rollouts are sampled from the beginning."""
    version: int | None = None
    """Policy version of the weights in vLLM; None if unknown."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Return `num_generations` rollouts for each prompt, in the order of the prompts.

        Raises:
            UniAPLError: vLLM does not come back, returns malformed completions or has other weights.
        """
        return self.sample_with(request, self.settings)

    def sample_with(self, request: SampleRequest, settings: SamplingSettings) -> list[tuple[Rollout, ...]]:
        """:meth:`sample` with other settings, for example those of evaluation. The canary keeps its own."""
        with _resume_hint():
            return self._with_weights(request.policy_version, lambda: self._generate(request, settings))

    def begin(self, request: SampleRequest) -> Callable[[], list[tuple[Rollout, ...]] | None]:
        """Send the weights and start sampling in the background.

        Returns:
            A function that waits for the rollouts; it must be called before the next request. It returns
            None if vLLM was lost, because the policy no longer has the weights that were sent.

        Raises:
            UniAPLError: As in :meth:`sample`, also from the returned function.
        """
        with _resume_hint():
            self._with_weights(request.policy_version, lambda: None)
        pending = in_background(lambda: self._generate(request, self.settings))

        def wait() -> list[tuple[Rollout, ...]] | None:
            try:
                with _resume_hint():
                    return pending.result()
            except EngineLostError:
                self.version = None
                return None

        return wait

    def check(self) -> None:
        """Send the weights and compare the canary, to report errors before training starts.

        Raises:
            UsageError: vLLM is not available, or does not load the weights.
        """
        try:
            self._with_weights(BEFORE_TRAINING, lambda: None)
        except UniAPLError as error:
            raise UsageError(str(error)) from error

    def _with_weights(self, version: int, work: Callable[[], Result]) -> Result:
        """Return the result of `work` with these weights in vLLM; start again whenever vLLM is lost."""

        def attempt() -> Result:
            if self.version != version:
                self._send_weights()
                self._check_canary(version)
                self.version = version
            return work()

        def lost() -> None:
            self.version = None

        return until_done(attempt, lost)

    def _generate(self, request: SampleRequest, settings: SamplingSettings) -> list[tuple[Rollout, ...]]:
        turns = Turns(engine=self.engine, settings=settings)
        return self.with_tools(turns, settings.max_completion_length).sample(request)

    def _send_weights(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        model = merged(self.model)
        device = self.model.device.type
        with self.autocast():
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        try:
            cast("Any", model).save_pretrained(self.directory, state_dict=_state(model, dtype))
            self.engine.load(self.directory.resolve())
        except (OSError, SafetensorError) as error:
            raise UniAPLError(
                f"the weights for vLLM cannot be written to '{self.directory}': {error}. Free disk space, or "
                "choose another --output-dir"
            ) from error
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _check_canary(self, version: int) -> None:
        """Compare the log-probabilities that vLLM reports with the trainer's.

        Raises:
            UniAPLError: They differ: vLLM has other weights, or computes something else.
        """
        difference = canary_difference(self.engine, [self.canary], self.model, self.settings, self.autocast)
        # `difference > tolerance` would accept NaN.
        if not difference <= self.tolerance:
            when = "before the first step" if version == BEFORE_TRAINING else f"after step {version}"
            raise UniAPLError(
                f"vLLM does not sample with the weights sent {when}: its log-probabilities differ from the "
                f"trainer's by {difference:.2g} nats per token (rollout.vllm_max_logp_difference is "
                f"{self.tolerance:g}). A server needs --logprobs-mode {self.settings.logprobs_mode}, the "
                "trainer's dtype, and no other client that sends it weights; vLLM's CPU build cannot reload "
                "the output head of a model with tied embeddings"
            )


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Samples single turns with the weights that vLLM has."""

    engine: Colocated | Server
    settings: SamplingSettings

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """See :class:`Sampler`."""
        settings = self.settings.limited(request.max_completion_length)
        groups = _completions(self.engine, request, settings)
        lengths = request.completion_lengths or [settings.max_completion_length] * len(groups)
        return [
            settings.limited(length).rollouts(group, request.policy_version)
            for group, length in zip(groups, lengths, strict=True)
        ]

    def check(self) -> None:
        """See :class:`Sampler`: the weights have been checked."""


def until_done(work: Callable[[], Result], lost: Callable[[], None]) -> Result:
    """Return the result of `work`; repeat it whenever vLLM is lost, after a call of `lost`.

    Raises:
        UniAPLError: vLLM was lost too often.
    """
    losses: list[str] = []
    while len(losses) <= MAX_RESTARTS:
        try:
            return work()
        except EngineLostError as error:
            lost()
            losses.append(str(error))
    raise UniAPLError(f"vLLM was lost {len(losses)} times: {'; '.join(dict.fromkeys(losses))}")


def canary_difference(
    engine: Colocated | Server,
    prompts: Sequence[TokenIds],
    model: PreTrainedModel,
    settings: SamplingSettings,
    autocast: Callable[..., AbstractContextManager[Any]],
) -> float:
    """Mean absolute difference of vLLM's and a model's log-probabilities, in nats per token.

    vLLM completes the prompts, and the model computes the log-probabilities of these completions. The
    difference is infinite if they have tokens that the model lacks.
    """
    length = min(CANARY_TOKENS, settings.max_completion_length)
    settings = replace(settings, max_completion_length=length, stop_ids=(), stop_strings=None)
    request = SampleRequest(prompts=prompts, seeds=range(len(prompts)), num_generations=1)
    differences: list[float] = []
    for prompt, ((ids, reported),) in zip(prompts, _completions(engine, request, settings), strict=True):
        if max(ids) >= cast("Any", model.config).get_text_config().vocab_size:
            return math.inf
        with torch.inference_mode(), autocast():
            expected = _logprobs(model, prompt, ids, settings.temperature)
        differences += [abs(a - b) for a, b in zip(expected, reported, strict=True)]
    return statistics.fmean(differences)


def _logprobs(
    model: PreTrainedModel, prompt: TokenIds, completion: Sequence[int], temperature: float
) -> list[float]:
    """A model's log-probabilities of a completion."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits[0, len(prompt) - 1 : -1].float()
    temperatures = torch.full((len(logits),), temperature, device=ids.device)
    return items_of(logprobs_from_logits(logits, ids[0, len(prompt) :], temperatures)[0])


def _completions(
    engine: Colocated | Server, request: SampleRequest, settings: SamplingSettings
) -> list[list[SampledTokens]]:
    """The completions of each prompt, as vLLM returns them."""
    max_tokens, strings = settings.max_completion_length, settings.stop_strings
    # Every parameter that the model's generation_config.json could change is set.
    params: dict[str, Any] = {
        "n": request.num_generations,
        "max_tokens": max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty,
        "logprobs": 0,
        "stop_token_ids": sorted(settings.stop_ids),
        # Only the trainer's stop tokens end a completion.
        "ignore_eos": True,
    }
    if strings is not None:
        # vLLM may return tokens after the text; SamplingSettings.rollouts removes them.
        params |= {"stop": list(strings.strings), "skip_special_tokens": False}
    groups = engine.generate(request, params)
    limits = request.completion_lengths or [max_tokens] * len(groups)
    for group, max_tokens in zip(groups, limits, strict=True):
        lengths = [(len(ids), len(logprobs)) for ids, logprobs in group]
        if len(group) != request.num_generations or any(
            a != b or not 0 < a <= max_tokens for a, b in lengths
        ):
            raise UniAPLError(
                f"vLLM returned malformed completions: expected {request.num_generations} of 1 to "
                f"{max_tokens} tokens with one log-probability each; their lengths are {lengths}"
            )
    return groups


def _state(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A model's state dictionary on the CPU, with floating-point tensors in `dtype`."""
    copies: dict[Tensor, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in copies:
            copies[tensor] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        # Tied tensors stay one tensor, so that they are written once.
        state[name] = copies[tensor]
    return state


@contextmanager
def _resume_hint() -> Generator[None]:
    try:
        yield
    except UniAPLError as error:
        raise UniAPLError(f"{error}. --resume auto continues from the last checkpoint") from error
