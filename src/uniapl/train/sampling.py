"""What a stage samples with: the local sampler in every process, or vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.errors import UniAPLError, UsageError
from uniapl.rollout import Sampler
from uniapl.rollout.engines import Colocated, Server
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.vllm import VLLMSampler
from uniapl.train.setup import WEIGHTS_IN_TRANSIT, Materials
from uniapl.types import Rollout, TokenIds

Result = TypeVar("Result")


def build_sampler(
    config: Config, model: PreTrainedModel, materials: Materials, accelerator: Accelerator
) -> Sampler:
    """The sampler that the configuration names; tried out, where the method samples at all.

    Raises:
        UsageError: It cannot sample from this model, or not here.
    """
    rollout = config.rollout
    if rollout.sampler == "local":
        sampler = LocalSampler(
            model=model,
            stop_ids=materials.stop_ids,
            pad_id=materials.pad_id,
            max_completion_length=rollout.max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_rows=rollout.max_rows,
            decoding=rollout.decoding,
            autocast=accelerator.autocast,
        )
    else:
        sampler = FirstProcessSampler(_vllm(config, model, materials, accelerator), accelerator)
    if config.objective.uses_rollouts:
        sampler.check()
    return sampler


def _vllm(
    config: Config, model: PreTrainedModel, materials: Materials, accelerator: Accelerator
) -> VLLMSampler:
    rollout = config.rollout
    bf16 = accelerator.mixed_precision == "bf16"
    prompts = [example.prompt_ids for example in materials.dataset.examples]
    if rollout.vllm_mode == "server":
        engine = Server(
            url=rollout.vllm_server_base_url, temperature=rollout.temperature, timeout=rollout.vllm_timeout
        )
    elif accelerator.num_processes > 1:
        raise UsageError(
            "rollout.vllm_mode 'colocate' is for one process: with several, start `vllm serve` on a GPU of "
            "its own and set rollout.vllm_mode server (docs/gpus.md)"
        )
    else:
        engine = Colocated(
            temperature=rollout.temperature,
            max_model_len=max(map(len, prompts)) + rollout.max_completion_length,
            max_rows=rollout.max_rows,
            gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
            dtype="bfloat16" if bf16 else "float32",
            on_gpu=accelerator.device.type == "cuda",
            timeout=rollout.vllm_timeout,
        )
    return VLLMSampler(
        engine=engine,
        model=model,
        autocast=accelerator.autocast,
        directory=Path(config.output_dir) / WEIGHTS_IN_TRANSIT,
        dtype=torch.bfloat16 if bf16 else None,
        canary=prompts[0],
        tolerance=rollout.vllm_max_logp_difference,
        temperature=rollout.temperature,
        stop_ids=materials.stop_ids,
        max_completion_length=rollout.max_completion_length,
    )


@dataclass(frozen=True)
class FirstProcessSampler:
    """One process speaks to the engine for all: weights are sent once, and all hear of a failure."""

    sampler: VLLMSampler
    accelerator: Accelerator

    def check(self) -> None:
        """See :class:`VLLMSampler`."""
        self._in_first_process(self.sampler.check)

    def sample(
        self,
        prompts: Sequence[TokenIds],
        *,
        seeds: Sequence[int],
        num_generations: int,
        policy_version: int,
    ) -> list[tuple[Rollout, ...]]:
        """This process's rollouts. See :class:`Sampler`."""
        shares = gather_object([(list(prompts), list(seeds))])
        everywhere = self._in_first_process(
            lambda: self.sampler.sample(
                [prompt for share, _ in shares for prompt in share],
                seeds=[seed for _, share in shares for seed in share],
                num_generations=num_generations,
                policy_version=policy_version,
            )
        )
        before = sum(len(share) for share, _ in shares[: self.accelerator.process_index])
        return everywhere[before : before + len(prompts)]

    def _in_first_process(self, work: Callable[[], Result]) -> Result:
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
