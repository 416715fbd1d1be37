"""The sampler of a stage: the local sampler in every process, or vLLM."""

from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel

from uniapl.config import Config
from uniapl.errors import UsageError
from uniapl.rollout import Sampler
from uniapl.rollout.engines import Colocated, Server
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.settings import SamplingSettings
from uniapl.rollout.vllm import VLLMSampler
from uniapl.tools.sampler import with_tools as tools_for
from uniapl.training.checkpoint.run_directory import WEIGHTS_IN_TRANSIT
from uniapl.training.distributed.one_step_off import OneStepOffSampler
from uniapl.training.distributed.rank_zero_sampler import RankZeroSampler
from uniapl.training.inputs import RunInputs


def build_sampler(
    config: Config, model: PreTrainedModel, inputs: RunInputs, accelerator: Accelerator
) -> Sampler:
    """Build the sampler of the configuration."""
    rollout = config.rollout
    if rollout.sampler == "local":
        sampler = LocalSampler(
            model=model,
            settings=SamplingSettings.of_rollouts(config, inputs.stop_ids, inputs.tokenizer),
            pad_id=inputs.pad_id,
            max_batch_size=rollout.max_batch_size,
            decoding=rollout.decoding,
            autocast=accelerator.autocast,
        )
        return with_tools(sampler, config, inputs, rollout.max_completion_length)
    kind = OneStepOffSampler if rollout.max_off_policy_steps else RankZeroSampler
    return kind(sampler=_vllm_sampler(config, model, inputs, accelerator), accelerator=accelerator)


def with_tools(sampler: Sampler, config: Config, inputs: RunInputs, max_completion_length: int) -> Sampler:
    """The sampler, with the configured tools.

    Raises:
        UsageError: The calls that the chat template writes cannot be read.
    """
    return tools_for(
        sampler,
        inputs.tools,
        config,
        inputs.tokenizer,
        inputs.stop_ids,
        max_completion_length=max_completion_length,
    )


def check_processes(config: Config, processes: int) -> None:
    """Raise a UsageError if a stage would need a colocated vLLM in each of several processes."""
    rollout = config.rollout
    colocated = rollout.sampler == "vllm" and rollout.vllm_mode == "colocate"
    if config.objective.uses_rollouts and colocated and processes > 1:
        raise UsageError(
            "rollout.vllm_mode 'colocate' is for one process: with several, start `vllm serve` on a separate "
            "GPU and set rollout.vllm_mode server"
        )


def _vllm_sampler(
    config: Config, model: PreTrainedModel, inputs: RunInputs, accelerator: Accelerator
) -> VLLMSampler:
    rollout = config.rollout
    settings = SamplingSettings.of_rollouts(config, inputs.stop_ids, inputs.tokenizer)
    prompts = [example.prompt_ids for example in inputs.dataset.examples]
    lengths = [max(map(len, prompts)) + rollout.max_completion_length]
    lengths += [
        len(example.prompt_ids) + config.evaluation.max_completion_length
        for suite in inputs.suites
        for example in suite.examples
    ]
    if rollout.vllm_mode == "server":
        engine = Server(url=rollout.vllm_server_base_url.rstrip("/"), timeout=rollout.vllm_timeout)
    else:
        arguments = {
            "logprobs_mode": settings.logprobs_mode,
            "dtype": "bfloat16" if accelerator.mixed_precision == "bf16" else "float32",
            "max_model_len": max(lengths),
            "max_num_seqs": rollout.max_batch_size,
            "gpu_memory_utilization": rollout.vllm_gpu_memory_utilization,
            # Compilation pays off only on a GPU.
            "enforce_eager": accelerator.device.type != "cuda",
        }
        has_strings = bool(rollout.stop_strings or config.evaluation.stop_strings)
        engine = Colocated(
            settings=arguments,
            timeout=rollout.vllm_timeout,
            tokenizer=inputs.tokenizer if has_strings else None,
        )
    return VLLMSampler(
        engine=engine,
        model=model,
        autocast=accelerator.autocast,
        directory=Path(str(accelerator.project_dir)) / WEIGHTS_IN_TRANSIT,
        canary=prompts[0],
        tolerance=rollout.vllm_max_logp_difference,
        settings=settings,
    )
