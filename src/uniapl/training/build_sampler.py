"""What a stage samples with: the local sampler in every process, or vLLM."""

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.errors import UsageError
from uniapl.rollout import Sampler
from uniapl.rollout.engines import Colocated, Server
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.vllm import VLLMSampler
from uniapl.training.checkpoint.run_directory import WEIGHTS_IN_TRANSIT
from uniapl.training.distributed.one_step_off import Ahead
from uniapl.training.distributed.rank_zero_sampler import RankZeroSampler
from uniapl.training.inputs import RunInputs


def build_sampler(
    config: Config, model: PreTrainedModel, inputs: RunInputs, accelerator: Accelerator
) -> Sampler:
    """The sampler that the configuration names."""
    rollout = config.rollout
    if rollout.sampler == "local":
        return LocalSampler(
            model=model,
            stop_ids=inputs.stop_ids,
            pad_id=inputs.pad_id,
            max_completion_length=rollout.max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_batch_size=rollout.max_batch_size,
            decoding=rollout.decoding,
            autocast=accelerator.autocast,
        )
    engine = _vllm(config, model, inputs, accelerator)
    speaker = RankZeroSampler(sampler=engine, accelerator=accelerator)
    return Ahead(sampler=speaker) if rollout.max_off_policy_steps else speaker


def check_processes(config: Config, processes: int) -> None:
    """Whether a stage can sample in so many processes.

    Raises:
        UsageError: It would need a vLLM in each.
    """
    rollout = config.rollout
    colocated = rollout.sampler == "vllm" and rollout.vllm_mode == "colocate"
    if config.objective.uses_rollouts and colocated and processes > 1:
        raise UsageError(
            "rollout.vllm_mode 'colocate' is for one process: with several, start `vllm serve` on a GPU of "
            "its own and set rollout.vllm_mode server (docs/gpus.md)"
        )


def _vllm(config: Config, model: PreTrainedModel, inputs: RunInputs, accelerator: Accelerator) -> VLLMSampler:
    rollout = config.rollout
    bf16 = accelerator.mixed_precision == "bf16"
    prompts = [example.prompt_ids for example in inputs.dataset.examples]
    if rollout.vllm_mode == "server":
        engine = Server(
            url=rollout.vllm_server_base_url.rstrip("/"),
            temperature=rollout.temperature,
            timeout=rollout.vllm_timeout,
        )
    else:
        engine = Colocated(
            temperature=rollout.temperature,
            max_model_len=max(map(len, prompts)) + rollout.max_completion_length,
            max_batch_size=rollout.max_batch_size,
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
        stop_ids=inputs.stop_ids,
        max_completion_length=rollout.max_completion_length,
    )
