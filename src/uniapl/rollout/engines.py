"""The engines of the vLLM sampler: in the training process (Colocated) or behind a URL (Server).

Both load weights from a directory and return the completions of each prompt, with log-probabilities at the
sampling temperature. Every call ends in bounded time.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import PreTrainedTokenizerBase

from uniapl.config import RolloutConfig
from uniapl.errors import UniAPLError, UsageError
from uniapl.http import RequestError, check_url, request_json
from uniapl.rollout import SampledTokens, SampleRequest
from uniapl.rollout.settings import warps
from uniapl.threads import DeadlineError, call_with_deadline, map_in_threads
from uniapl.untyped import is_dict

Result = TypeVar("Result")

PAUSE = 1.0
"""Seconds between two health checks of a server that is down."""
MAX_REQUESTS = 64
"""Requests to a server at the same time; vLLM forms its own batches from them."""
RELOAD = "/collective_rpc"
"""Path of the endpoint that loads weights."""
SEEDS = 2**62
"""vLLM adds the number of the rollout to the seed of the prompt; both must be 64-bit integers."""


class EngineLostError(Exception):
    """vLLM did not respond; after a restart it may have other weights."""


def check_vllm(config: RolloutConfig) -> None:
    """Raise a UsageError if vLLM or httpx is not installed, the URL is invalid, or a setting does not fit."""
    if warps(config) and config.temperature != 1:
        raise UsageError(
            "with rollout.sampler vllm, top_p, top_k, min_p and repetition_penalty need rollout.temperature "
            "1: the loss uses the log-probabilities before them, which vLLM reports only at temperature 1. "
            "Set it, or use rollout.sampler local"
        )
    if config.vllm_mode == "server":
        url = config.vllm_server_base_url
        check_url("rollout.vllm_server_base_url", url)
        if url.rstrip("/").endswith("/v1"):
            raise UsageError(
                f"rollout.vllm_server_base_url '{url}': leave out /v1; the endpoint that loads "
                "weights is not below it"
            )
    elif not _installed("vllm"):
        raise UsageError(
            "rollout.sampler 'vllm' needs vLLM in this environment: pip install 'uniapl[vllm]', or start "
            "`vllm serve` in another environment and set rollout.vllm_mode server"
        )


def _installed(name: str) -> bool:
    """Whether a package can be imported; a plain directory of that name does not count."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def _of_prompts(request: SampleRequest, params: dict[str, Any]) -> list[dict[str, Any]]:
    """The sampling parameters of each prompt: its seed, and its own limit if it has one."""
    seeds = [{"seed": seed % SEEDS} for seed in request.seeds]
    if request.completion_lengths is None:
        return [params | seed for seed in seeds]
    limits = [{"max_tokens": length} for length in request.completion_lengths]
    return [params | seed | limit for seed, limit in zip(seeds, limits, strict=True)]


@dataclass(kw_only=True)
class Colocated:
    """vLLM on the trainer's device, started with the first weights."""

    settings: dict[str, Any]
    """Arguments of `vllm.LLM` that depend on the run."""
    timeout: float
    """Seconds for one call."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """For stop strings, which vLLM finds in decoded text; None if there are none."""
    llm: Any = None

    def load(self, directory: Path) -> None:
        """Load the weights in `directory` and drop the prefix cache of older weights."""
        if self.llm is None:
            self.llm = self._start(directory)
            return
        kwargs = {"weights_path": str(directory)}
        self._call(lambda: self.llm.collective_rpc("reload_weights", timeout=self.timeout, kwargs=kwargs))
        if not self._call(self.llm.reset_prefix_cache):
            raise UniAPLError("vLLM did not drop its prefix cache, which was computed with older weights")

    def generate(self, request: SampleRequest, params: dict[str, Any]) -> list[list[SampledTokens]]:
        """Return the completions of each prompt; `params` are vLLM's sampling parameters without the seed."""
        vllm = importlib.import_module("vllm")
        per_prompt = [
            vllm.SamplingParams(**one, detokenize="stop" in params) for one in _of_prompts(request, params)
        ]
        rows = [{"prompt_token_ids": list(prompt)} for prompt in request.prompts]
        outputs = list[Any]()
        if rows:
            outputs = self._call(lambda: self.llm.generate(rows, per_prompt, use_tqdm=False))
        return [
            [
                (list(o.token_ids), [at[i].logprob for i, at in zip(o.token_ids, o.logprobs, strict=True)])
                for o in output.outputs
            ]
            for output in outputs
        ]

    def _start(self, directory: Path) -> Any:
        vllm = importlib.import_module("vllm")
        if self.tokenizer is not None:
            cast("Any", self.tokenizer).save_pretrained(directory)
        try:
            return vllm.LLM(
                model=str(directory),
                # Prompts and completions are token ids.
                skip_tokenizer_init=self.tokenizer is None,
                generation_config="vllm",
                **self.settings,
            )
        except Exception as error:
            raise UniAPLError(f"vLLM did not start: {type(error).__name__}: {error!s:.500}") from error

    def _call(self, work: Callable[[], Result]) -> Result:
        try:
            return call_with_deadline(work, self.timeout)
        except DeadlineError:
            raise UniAPLError(f"vLLM gave no answer within rollout.vllm_timeout {self.timeout:g} s") from None
        except Exception as error:
            raise UniAPLError(f"vLLM failed: {type(error).__name__}: {error!s:.500}") from error


@dataclass(frozen=True, kw_only=True)
class Server:
    """vLLM behind a URL, started by the user with its development endpoints."""

    url: str
    """Without a trailing slash."""
    timeout: float
    """Seconds for one request, and for the server to become healthy."""

    def load(self, directory: Path) -> None:
        """Wait until the server is healthy; load the weights in `directory` and drop the prefix cache."""
        self.wait()
        kwargs = {"weights_path": str(directory)}
        self._post(RELOAD, {"method": "reload_weights", "kwargs": kwargs, "timeout": self.timeout})
        response = self._post("/reset_prefix_cache")
        if not is_dict(response) or response.get("success") is not True:
            raise EngineLostError(f"{self.url} did not drop its prefix cache ({response})")

    def generate(self, request: SampleRequest, params: dict[str, Any]) -> list[list[SampledTokens]]:
        """Return the completions of each prompt. See :meth:`Colocated.generate`."""
        bodies = [
            {"prompt": list(prompt), "return_token_ids": True, **one}
            for prompt, one in zip(request.prompts, _of_prompts(request, params), strict=True)
        ]
        responses = map_in_threads(
            lambda body: self._post("/v1/completions", body), bodies, num_threads=MAX_REQUESTS
        )
        return [self._completions(response) for response in responses]

    def wait(self) -> None:
        """Wait until the server is healthy; raise a UniAPLError if it is not within `timeout`."""
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                request_json(f"{self.url}/health", timeout=max(left, PAUSE), method="GET")
                return
            except RequestError as error:
                if left <= 0:
                    raise UniAPLError(
                        f"the vLLM server {self.url} did not come up within rollout.vllm_timeout "
                        f"{self.timeout:g} s: {error}. Start it with `vllm serve`, or correct "
                        "rollout.vllm_server_base_url"
                    ) from None
            time.sleep(PAUSE)

    def model(self) -> str | None:
        """The directory or Hub id of the model that it was started with; None if it does not report one."""
        try:
            found = request_json(f"{self.url}/v1/models", timeout=self.timeout, method="GET")["data"][0]
            return str(found.get("root") or found["id"])
        except (RequestError, LookupError, TypeError, AttributeError):
            return None

    def _post(self, path: str, body: Any = None) -> Any:
        try:
            return request_json(self.url + path, body, timeout=self.timeout)
        except RequestError as error:
            if not error.permanent:
                # vLLM reports a directory that it cannot find only as status 500.
                unseen = path == RELOAD and error.status == 500
                remedy = "; the server must see the run's directory under the same path" if unseen else ""
                raise EngineLostError(f"{self.url}{path}: {error}{remedy}") from error
            remedy = "; start it with VLLM_SERVER_DEV_MODE=1" if error.status == 404 else ""
            raise UniAPLError(f"the vLLM server {self.url} rejects {path}: {error}{remedy}") from error

    def _completions(self, response: Any) -> list[SampledTokens]:
        """The completions in a response of the documented form."""
        try:
            return [
                (
                    [int(token) for token in choice["token_ids"]],
                    [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]],
                )
                for choice in sorted(response["choices"], key=lambda choice: choice["index"])
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise UniAPLError(
                f"the response of the vLLM server {self.url} does not have the format of vLLM 0.32: {error!r}"
            ) from error
