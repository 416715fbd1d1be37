"""The sampler that runs in vLLM: another program than the trainer, which is sent the weights and then tested.

Every step's weights are written to a directory as transformers has them, vLLM loads them from there, and a
canary, one answer of vLLM's scored by the trainer, shows that it has. Only then it is sampled from.
"""

import shutil
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from uniapl.errors import UniAPLError, UsageError
from uniapl.functional import logprobs_from_logits
from uniapl.models.lora import merged
from uniapl.rollout import SampleRequest
from uniapl.threads import in_background
from uniapl.types import Rollout, TokenIds

Answer = tuple[list[int], list[float]]
"""Sampled ids with their log-probabilities."""
Result = TypeVar("Result")

CANARY_TOKENS = 32
"""Of the canary's answer at most: enough for a mean, a moment's work. Our choice."""
MOST_LOSSES = 3
"""Times that vLLM may be lost and come back within one step. Our choice."""
BEFORE_TRAINING = -1
"""The version of the weights that the check before the first step sends."""


class EngineLostError(Exception):
    """vLLM did not answer; what answers next may have other weights."""


@runtime_checkable
class Engine(Protocol):
    """vLLM, wherever it runs. Every call ends in bounded time, or raises :class:`EngineLostError`."""

    def load(self, directory: Path) -> None:
        """Take the weights in `directory`, and forget what was computed with others."""
        ...

    def generate(
        self, request: SampleRequest, *, max_tokens: int, stop_ids: Collection[int]
    ) -> list[list[Answer]]:
        """Answers with log-probabilities at the sampling temperature, the stop token included."""
        ...

    def wait(self) -> None:
        """Until it answers again."""
        ...


@dataclass(kw_only=True)
class VLLMSampler:
    """Samples with the weights of the step that is asked for; all of vLLM's troubles end in one message."""

    engine: Engine
    model: PreTrainedModel
    """The policy: its weights are sent, and the canary is scored by it."""
    autocast: Callable[..., AbstractContextManager[Any]]
    directory: Path
    """Where the weights lie while they are loaded; a server must see it under the same name."""
    dtype: torch.dtype | None
    """Of the weights as they are sent; None leaves them as they are."""
    canary: TokenIds
    """A prompt."""
    tolerance: float
    """Nats per token that vLLM may differ from the trainer, in the mean of the canary's answer."""
    temperature: float
    stop_ids: Collection[int]
    """Tokens that end an answer; they are part of it."""
    max_completion_length: int
    version: int | None = None
    """Of the weights that vLLM is known to have."""

    def sample(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """`num_generations` rollouts for each prompt, in the prompts' order. See :class:`Sampler`.

        Raises:
            UniAPLError: vLLM is lost for good, or answers in another form or with other weights.
        """
        with _remedy_named():
            return self._with_weights(request.policy_version, lambda: self._answers(request))

    def begin(self, request: SampleRequest) -> Callable[[], list[tuple[Rollout, ...]] | None]:
        """Send the weights, and let vLLM answer while the caller goes on.

        Returns:
            What waits for the rollouts, before which nothing else may be asked. None of it if vLLM was lost:
            the weights that it had are no longer the policy's.

        Raises:
            UniAPLError: As :meth:`sample`, now or when the rollouts are waited for.
        """
        with _remedy_named():
            self._with_weights(request.policy_version, lambda: None)
        answers = in_background(lambda: self._answers(request))

        def land() -> list[tuple[Rollout, ...]] | None:
            try:
                with _remedy_named():
                    return answers.result()
            except EngineLostError:
                self.version = None
                return None

        return land

    def check(self) -> None:
        """Send weights and look at the canary, to hear before training of what cannot work.

        Raises:
            UsageError: vLLM is not there, or does not take weights.
        """
        try:
            self._with_weights(BEFORE_TRAINING, lambda: None)
        except UniAPLError as error:
            raise UsageError(str(error)) from error

    def _with_weights(self, version: int, work: Callable[[], Result]) -> Result:
        """What `work` returns once vLLM has the weights; everything anew if it is lost on the way."""
        losses: list[str] = []
        while len(losses) <= MOST_LOSSES:
            try:
                if losses:
                    self.engine.wait()
                if self.version != version:
                    self._send_weights()
                    self._look_at_canary(version)
                    self.version = version
                return work()
            except EngineLostError as error:
                self.version = None
                losses.append(str(error))
        raise UniAPLError(f"vLLM was lost {len(losses)} times: {'; '.join(dict.fromkeys(losses))}")

    def _answers(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        groups = self.engine.generate(request, max_tokens=self.max_completion_length, stop_ids=self.stop_ids)
        for group in groups:
            _check_form(group, request.num_generations, self.max_completion_length)
        version = request.policy_version
        return [tuple(self._rollout(ids, lps, version) for ids, lps in group) for group in groups]

    def _send_weights(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        model = merged(self.model)
        try:
            model.save_pretrained(self.directory, state_dict=_state(model, self.dtype))
        except (OSError, SafetensorError) as error:
            raise UniAPLError(
                f"the weights for vLLM cannot be written to '{self.directory}': {error}. Free some room "
                "there, or choose another --output-dir"
            ) from error
        else:
            self.engine.load(self.directory.resolve())
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _look_at_canary(self, version: int) -> None:
        """Compare the log-probabilities that vLLM reports with the trainer's.

        Raises:
            UniAPLError: They differ: vLLM has other weights, or computes something else.
        """
        length = min(CANARY_TOKENS, self.max_completion_length)
        request = SampleRequest(prompts=[self.canary], seeds=[0], num_generations=1)
        (group,) = self.engine.generate(request, max_tokens=length, stop_ids=())
        _check_form(group, 1, length)
        ids, theirs = group[0]
        ours = self._score(self.canary, ids)
        difference = statistics.fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        # Not >, which NaN would pass.
        if not difference <= self.tolerance:
            when = "before the first step" if version == BEFORE_TRAINING else f"after step {version}"
            raise UniAPLError(
                f"the weights that vLLM was sent {when} are not those that it samples with: its "
                f"log-probabilities differ from the trainer's by {difference:.2g} nats per token "
                f"(rollout.vllm_max_logp_difference is {self.tolerance:g}). A server needs --logprobs-mode "
                "processed_logprobs, the trainer's dtype, and nobody else who sends it weights; "
                "docs/gpus.md lists what vLLM cannot reload"
            )

    @torch.inference_mode()
    def _score(self, prompt: TokenIds, completion: Sequence[int]) -> list[float]:
        """The trainer's log-probabilities of an answer."""
        ids = torch.tensor([[*prompt, *completion]], device=self.model.device)
        with self.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits
        behind = logits[0, len(prompt) - 1 : -1].float()
        temperature = torch.full((len(behind),), self.temperature, device=ids.device)
        return logprobs_from_logits(behind, ids[0, len(prompt) :], temperature)[0].tolist()

    def _rollout(self, ids: list[int], logprobs: list[float], version: int) -> Rollout:
        return Rollout(
            completion_ids=tuple(ids),
            sampling_logprobs=tuple(logprobs),
            finish_reason="stop" if ids[-1] in self.stop_ids else "length",
            policy_version=version,
        )


def _state(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a model's files hold, in another type, and not on the device that trains."""
    sent: dict[Tensor, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor not in sent:
            to = dtype if tensor.is_floating_point() else None
            sent[tensor] = tensor.detach().to("cpu", to)
        # Tied tensors stay one, so that they are written once.
        state[name] = sent[tensor]
    return state


@contextmanager
def _remedy_named() -> Iterator[None]:
    try:
        yield
    except UniAPLError as error:
        raise UniAPLError(f"{error}. --resume auto goes on from the last checkpoint") from error


def _check_form(group: Sequence[Answer], count: int, longest: int) -> None:
    """So many answers, none empty or too long, each id with a log-probability."""
    lengths = [(len(ids), len(logprobs)) for ids, logprobs in group]
    if len(group) != count or any(a != b or not 0 < a <= longest for a, b in lengths):
        raise UniAPLError(
            f"vLLM gave answers of another form: {count} were asked for, of 1 to {longest} tokens, each with "
            f"its log-probability; their lengths are {lengths}"
        )
