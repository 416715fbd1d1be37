"""The sampler of a stage: the local sampler in every process, or vLLM."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uniapl.config import Config, RolloutConfig
from uniapl.data.marks import MARK
from uniapl.data.rendering import ChatTemplate
from uniapl.data.tokenization import encode_results
from uniapl.errors import UsageError
from uniapl.models.loading import pad_id_of
from uniapl.rollout import Sampler
from uniapl.rollout.engines import Colocated, Server, check_vllm
from uniapl.rollout.local import LocalSampler
from uniapl.rollout.served import ServedModel
from uniapl.rollout.settings import SamplingSettings
from uniapl.rollout.vllm import VLLMSampler
from uniapl.tools.calls import CallParser
from uniapl.tools.environments import Toolset, find_toolset
from uniapl.tools.functions import Tool
from uniapl.tools.sampler import ToolSampler
from uniapl.tools.trajectories import Toolbox
from uniapl.training.checkpoint.run_directory import WEIGHTS_IN_TRANSIT
from uniapl.training.distributed.one_step_off import OneStepOffSampler
from uniapl.training.distributed.rank_zero_sampler import RankZeroSampler
from uniapl.training.inputs import RunInputs
from uniapl.types import TokenIds

CANARY_PROMPTS = 8
"""Prompts on which evaluation compares a server with the model; bf16 alone changes the log-probabilities of a
few tokens by almost the default tolerance. Our choice."""
SERVED = {
    "sampler": "local, or vllm for a running server with the model (default: local)",
    "vllm_server_base_url": "URL of `vllm serve` (default: http://localhost:8000)",
    "vllm_timeout": "seconds for a call, and for the server to start (default: 600)",
    "vllm_mode": argparse.SUPPRESS,
    "vllm_max_logp_difference": argparse.SUPPRESS,
}
"""Keys of `rollout` that select the sampler of `uniapl evaluate`, and their lines in its `--help`."""


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


def evaluation_sampler(
    config: Config,
    model: PreTrainedModel,
    tooling: "Tooling",
    settings: SamplingSettings,
    prompts: Sequence[TokenIds],
    *,
    max_batch_size: int,
) -> tuple[Sampler, list[str]]:
    """The sampler of `uniapl evaluate`, and notes on it: the local one, or a server that has the model.

    Args:
        prompts: Some prompts, on which a server is compared with the model.

    Raises:
        UsageError: The server is not available or has another model, or a setting is not valid.
    """
    rollout, notes = config.rollout, list[str]()
    if rollout.sampler == "vllm":
        sampler = _served_model(rollout, model, settings, prompts)
        notes.append(
            f"completions come from the vLLM server {sampler.engine.url}, started with "
            f"'{sampler.engine.model()}'; its log-probabilities differ from the model's by "
            f"{sampler.difference:.2g} nats per token on average"
        )
    else:
        given = rollout.model_dump(include={*SERVED}, exclude={"vllm_mode"}, exclude_defaults=True)
        if given:
            raise UsageError(f"--{min(given).replace('_', '-')} has no effect without --sampler vllm")
        sampler = LocalSampler(
            model=model,
            settings=settings,
            pad_id=pad_id_of(tooling.tokenizer),
            max_batch_size=max_batch_size,
            decoding=rollout.decoding,
        )
    return with_tools(sampler, config, tooling, settings.max_completion_length), notes


def _served_model(
    rollout: RolloutConfig,
    model: PreTrainedModel,
    settings: SamplingSettings,
    prompts: Sequence[TokenIds],
) -> ServedModel:
    """A running server that was compared with the model."""
    if rollout.vllm_mode != "server":
        raise UsageError(
            f"--vllm-mode {rollout.vllm_mode}: evaluation uses a running server; start `vllm serve` with the "
            "model, and remove the flag"
        )
    if not prompts:
        raise UsageError("--sampler vllm samples the completions of suites: give --suites, or remove it")
    check_vllm(rollout)
    sampler = ServedModel(
        engine=Server(url=rollout.vllm_server_base_url.rstrip("/"), timeout=rollout.vllm_timeout),
        settings=settings,
        model=model,
        canary=prompts[:CANARY_PROMPTS],
        tolerance=rollout.vllm_max_logp_difference,
    )
    sampler.check()
    return sampler


@dataclass(frozen=True, kw_only=True)
class Tooling:
    """What tools need of :class:`RunInputs`, for samplers outside of a run."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    toolset: Toolset

    @property
    def tools(self) -> tuple[Tool, ...]:
        """Functions, and the methods of the environment."""
        return self.toolset.tools

    @staticmethod
    def of(config: Config, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> "Tooling":
        """Find the configured tools.

        Raises:
            UsageError: See :func:`find_toolset`; or the chat template does not show the tools, or its calls
                cannot be read, or it does not show results.
        """
        found = Tooling(
            tokenizer=tokenizer, stop_ids=frozenset(stop_ids), toolset=find_toolset(config.rollout)
        )
        if found.tools:
            found._check(config)
        return found

    def _check(self, config: Config) -> None:
        if not self.tokenizer.chat_template:
            raise UsageError(
                "rollout.tools and rollout.environment need a chat template, which writes tools and calls: "
                "choose a model that has one, or set model.chat_template_path"
            )
        form = _form(config, self)
        prompt = form.render([{"role": "user", "content": "?"}])
        if missing := [tool.name for tool in self.tools if tool.name not in prompt]:
            raise UsageError(
                f"rollout.tools, rollout.environment: the chat template does not show {', '.join(missing)}; "
                "use a model whose template has tools, or set model.chat_template_path"
            )
        CallParser.of(form, self.stop_ids)
        name = self.tools[0].name
        answers = [{"role": "tool", "name": name, "content": MARK}]
        results = form.results([{"function": {"name": name}}], answers)
        if MARK not in results.answered:
            raise UsageError(
                "rollout.tools, rollout.environment: the chat template does not show the results of tools; "
                "use a model whose template does, or set model.chat_template_path"
            )
        encode_results(results, self.tokenizer, self.stop_ids)


def _form(config: Config, inputs: RunInputs | Tooling) -> ChatTemplate:
    return ChatTemplate(
        tokenizer=inputs.tokenizer,
        arguments=config.data.chat_template_kwargs,
        tools=[dict(tool.schema) for tool in inputs.tools],
    )


def with_tools(
    sampler: Sampler, config: Config, inputs: RunInputs | Tooling, max_completion_length: int
) -> Sampler:
    """The sampler, with the configured tools.

    Raises:
        UsageError: The calls that the chat template writes cannot be read.
    """
    rollout = config.rollout
    if not inputs.tools:
        return sampler
    form = _form(config, inputs)
    toolbox = Toolbox(
        tools={tool.name: tool for tool in inputs.tools},
        parser=CallParser.of(form, inputs.stop_ids),
        form=form,
        stop_ids=inputs.stop_ids,
        max_iterations=rollout.max_tool_calling_iterations or max_completion_length,
        timeout=rollout.tool_timeout,
        max_characters=rollout.max_tool_result_length,
    )
    return ToolSampler(sampler=sampler, toolbox=toolbox, max_completion_length=max_completion_length)


def check_processes(config: Config, processes: int) -> None:
    """Raise a UsageError if a stage samples in a way that is for one process, and there are several."""
    rollout = config.rollout
    if processes == 1 or rollout.sampler != "vllm" or not config.objective.uses_rollouts:
        return
    if rollout.vllm_mode == "colocate":
        raise UsageError(
            "rollout.vllm_mode 'colocate' is for one process: with several, start `vllm serve` on a separate "
            "GPU and set rollout.vllm_mode server"
        )
    if rollout.environment is not None:
        raise UsageError(
            "rollout.environment with rollout.sampler vllm is for one process: with several, one calls the "
            "tools of all, and environments cannot be sent to it; use one process, or sampler local"
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
        with_tools=lambda turns, limit: with_tools(turns, config, inputs, limit),
    )
