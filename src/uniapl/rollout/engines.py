"""vLLM's two places: in the training process, and behind a server's address."""

import importlib
import importlib.util
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from uniapl.config import RolloutConfig
from uniapl.errors import UniAPLError, UsageError
from uniapl.http import PostingError, ask, check_address
from uniapl.rollout.background import in_background, in_threads
from uniapl.rollout.vllm import Answer, EngineLostError
from uniapl.types import TokenIds

Result = TypeVar("Result")

PAUSE = 1.0
"""Seconds between two looks at whether a server is up."""
MOST_REQUESTS = 64
"""To a server at the same time; vLLM forms its own batches of them."""
RELOAD = "/collective_rpc"
"""Path of the endpoint by which weights are taken."""
SEEDS = 2**62
"""vLLM adds the rollout's number to a prompt's seed, and both must be 64-bit integers."""


def check_vllm(config: RolloutConfig) -> None:
    """Whether vLLM can be what samples.

    Raises:
        UsageError: Something is not installed, an address is none, or a setting is not for vLLM.
    """
    if config.top_p < 1 or config.top_k > 0:
        raise UsageError(
            "rollout.top_p and top_k are for rollout.sampler local: vLLM reports log-probabilities of what "
            "they leave over, the loss needs those of the whole distribution"
        )
    if config.vllm_mode == "server":
        url = config.vllm_server_base_url
        check_address("rollout.vllm_server_base_url", url)
        if url.rstrip("/").endswith("/v1"):
            raise UsageError(
                f"rollout.vllm_server_base_url '{url}': leave out /v1, beside which lies what takes weights"
            )
    elif not _installed("vllm"):
        raise UsageError(
            "rollout.sampler 'vllm' needs vLLM in this environment: pip install 'uniapl[vllm]', or start it "
            "as a server from its own and set rollout.vllm_mode server (docs/gpus.md)"
        )


def _installed(name: str) -> bool:
    """Whether it can be imported. A directory of that name, which Python takes for a package, is not it."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def _sampling(
    temperature: float, *, num_generations: int, max_tokens: int, stop_ids: Collection[int]
) -> dict[str, Any]:
    """What vLLM is asked, in its words; everything that a model's own settings could change is said."""
    return {
        "n": num_generations,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        "stop_token_ids": sorted(stop_ids),
        # What ends an answer is what the trainer says, nothing else.
        "ignore_eos": True,
    }


@dataclass(kw_only=True)
class Colocated:
    """vLLM on the trainer's own device, started when it is first given weights."""

    temperature: float
    max_model_len: int
    """Tokens of the longest prompt with its answer: sets the key-value cache that one needs at least."""
    max_batch_size: int
    gpu_memory_utilization: float
    dtype: str
    on_gpu: bool
    timeout: float
    llm: Any = None

    def load(self, directory: Path) -> None:
        """See :class:`Engine`."""
        if self.llm is None:
            self.llm = self._start(directory)
            return
        self._call(
            lambda: self.llm.collective_rpc(
                "reload_weights", timeout=self.timeout, kwargs={"weights_path": str(directory)}
            )
        )
        if not self._call(self.llm.reset_prefix_cache):
            raise UniAPLError("vLLM did not drop its prefix cache, which holds keys of other weights")

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        max_tokens: int,
        stop_ids: Collection[int],
    ) -> list[list[Answer]]:
        """See :class:`Engine`."""
        vllm = importlib.import_module("vllm")
        asked = _sampling(
            self.temperature, num_generations=num_generations, max_tokens=max_tokens, stop_ids=stop_ids
        )
        params = [vllm.SamplingParams(**asked, seed=seed % SEEDS, detokenize=False) for seed in seeds]
        rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._call(lambda: self.llm.generate(rows, params, use_tqdm=False)) if rows else []
        return [
            [
                (list(o.token_ids), [at[i].logprob for i, at in zip(o.token_ids, o.logprobs, strict=True)])
                for o in output.outputs
            ]
            for output in outputs
        ]

    def wait(self) -> None:
        """Nobody starts it again."""
        raise UniAPLError("a colocated vLLM does not come back")

    def _start(self, directory: Path) -> Any:
        vllm = importlib.import_module("vllm")
        try:
            return vllm.LLM(
                model=str(directory),
                # Token ids go in and come out.
                skip_tokenizer_init=True,
                dtype=self.dtype,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_batch_size,
                gpu_memory_utilization=self.gpu_memory_utilization,
                # Compiling pays where many steps run on a GPU.
                enforce_eager=not self.on_gpu,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
            )
        except Exception as error:  # whatever vLLM finds wrong with the model or the device
            raise UniAPLError(f"vLLM did not start: {type(error).__name__}: {error!s:.500}") from error

    def _call(self, work: Callable[[], Result]) -> Result:
        """What a call returns, within the time that it may take; one that hangs is left behind."""
        answer = in_background(work)
        try:
            return answer.result(self.timeout)
        except Exception as error:
            # vLLM has time-outs of its own.
            late = isinstance(error, TimeoutError) and not answer.done()
            said = f"gave no answer within rollout.vllm_timeout {self.timeout:g} s"
            failed = f"failed: {type(error).__name__}: {error!s:.500}"
            raise UniAPLError(f"vLLM {said if late else failed}") from error


@dataclass(frozen=True, kw_only=True)
class Server:
    """vLLM behind an address, started by somebody else with its development endpoints."""

    url: str
    """Without a slash at its end."""
    temperature: float
    timeout: float

    def load(self, directory: Path) -> None:
        """See :class:`Engine`."""
        body = {
            "method": "reload_weights",
            "kwargs": {"weights_path": str(directory)},
            "timeout": self.timeout,
        }
        self._ask(RELOAD, body)
        dropped = self._ask("/reset_prefix_cache")
        if not isinstance(dropped, dict) or dropped.get("success") is not True:
            raise EngineLostError(f"{self.url} did not drop its prefix cache ({dropped})")

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        max_tokens: int,
        stop_ids: Collection[int],
    ) -> list[list[Answer]]:
        """See :class:`Engine`."""
        asked = _sampling(
            self.temperature, num_generations=num_generations, max_tokens=max_tokens, stop_ids=stop_ids
        )
        bodies = [
            {"prompt": list(prompt), "seed": seed % SEEDS, "return_token_ids": True, **asked}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        found = in_threads(lambda body: self._ask("/v1/completions", body), bodies, at_once=MOST_REQUESTS)
        return [self._read(answer) for answer in found]

    def wait(self) -> None:
        """Until the server says that it is well.

        Raises:
            UniAPLError: It does not within `timeout`.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            try:
                ask(f"{self.url}/health", timeout=max(left, PAUSE), method="GET")
            except PostingError as error:
                if left <= 0:
                    raise UniAPLError(
                        f"the vLLM server {self.url} did not come up within rollout.vllm_timeout "
                        f"{self.timeout:g} s: {error}. Is it at rollout.vllm_server_base_url, started by "
                        "`vllm serve` as docs/gpus.md says?"
                    ) from None
                time.sleep(PAUSE)
            else:
                return

    def _ask(self, path: str, body: Any = None) -> Any:
        try:
            return ask(self.url + path, body, timeout=self.timeout)
        except PostingError as error:
            if not error.for_good:
                # Of a directory that it does not find it says no more.
                unseen = path == RELOAD and "status 500" in str(error)
                remedy = "; a server must see the run's directory under the same name" if unseen else ""
                raise EngineLostError(f"{self.url}{path}: {error}{remedy}") from error
            remedy = "; start it with VLLM_SERVER_DEV_MODE=1" if "status 404" in str(error) else ""
            raise UniAPLError(f"the vLLM server {self.url} refuses {path}: {error}{remedy}") from error

    def _read(self, answer: Any) -> list[Answer]:
        """The answers to one prompt, if they have the form that vLLM documents."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [
                (
                    [int(token) for token in choice["token_ids"]],
                    [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]],
                )
                for choice in choices
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise UniAPLError(
                f"the vLLM server {self.url} answers in another form than vLLM 0.32: {error!r}"
            ) from error
