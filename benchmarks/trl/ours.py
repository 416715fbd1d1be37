"""UniAPL's side of the benchmarks: a stage as `uniapl train` builds it, and its update of the policy."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from work import Work, data_rows, load, random_reward

from uniapl.config.resolve import merge, resolve, stages_of
from uniapl.data.batching import Row, micro_batches
from uniapl.training.distributed.accelerator import make_accelerator
from uniapl.training.given import Given
from uniapl.training.inputs import RunInputs
from uniapl.training.preflight.load import load_inputs
from uniapl.training.stage import Stage, build_stage
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.credit import assign_credit, rollout_rows
from uniapl.training.update.policy_step import policy_step
from uniapl.types import Example, Rollout, RolloutGroup


def recipe(work_or_shape: Any, folder: Path, options: Namespace) -> dict[str, Any]:
    """GRPO recipe with UniAPL's defaults for the benchmark's model and sizes."""
    shape = getattr(work_or_shape, "shape", work_or_shape)
    return {
        "method": "grpo",
        "model": {"model_name_or_path": str(folder)},
        "rollout": {
            "num_generations": shape.generations,
            "max_completion_length": shape.completion_length,
        },
        "batching": {"prompts_per_step": shape.prompts},
        "optim": {"bf16": options.bf16},
        "rewards": {"timeout": None},
    }


def our_stage(
    work: Work, folder: Path, options: Namespace, **changes: Any
) -> tuple[Accelerator, Stage, RunInputs]:
    """Build the first stage of a run, with its policy, optimizer and sampler."""
    resolved = resolve(merge(recipe(work, folder, options), changes))
    stages = stages_of(resolved)
    rows = data_rows(work.shape, 4)
    inputs = load_inputs(
        resolved, stages, Given(train_dataset=rows, reward_functions=[random_reward]), with_suites=False
    )
    accelerator = make_accelerator(resolved.config)
    model, _ = load(folder, options.device)
    return (
        accelerator,
        build_stage(stages[0].config, 0, model, inputs, accelerator, start=None),
        inputs,
    )


def our_rows(work: Work, stage: Stage, rollouts: Sequence[Rollout] | None = None) -> list[Row]:
    """Build the rows of a step from the work's completions, or from sampled rollouts, and its rewards."""
    size = work.shape.generations
    rollouts = rollouts or [given_rollout(completion) for completion in work.completions]
    groups = [
        RolloutGroup(
            example=Example(
                row=number + 1,
                prompt="",
                prompt_ids=tuple(prompt),
                demonstration=None,
                demonstration_ids=None,
                columns={},
            ),
            rollouts=tuple(rollouts[number * size : (number + 1) * size]),
            rewards=tuple(work.rewards[number * size : (number + 1) * size]),
            reward_parts={},
        )
        for number, prompt in enumerate(work.prompts)
    ]
    credits = assign_credit(groups, stage.config.objective, expert_mean=None, lambda_adv=0.0)
    return rollout_rows(groups, credits, temperature=stage.config.rollout.temperature)


def given_rollout(completion: Sequence[int]) -> Rollout:
    """A rollout with these tokens, whose sampling log-probabilities are unknown."""
    return Rollout(
        completion_ids=tuple(completion),
        sampling_logprobs=(0.0,) * len(completion),
        finish_reason="stop",
        policy_version=0,
    )


def our_update(
    work: Work, folder: Path, options: Namespace, *, max_tokens: int | None = None
) -> tuple[Callable[[], tuple[float, float]], nn.Module]:
    """Return a function that does one optimizer step and returns loss and gradient norm; and the model."""
    changes = {"batching": {"max_tokens_per_micro_batch": max_tokens}} if max_tokens else {}
    accelerator, stage, inputs = our_stage(work, folder, options, **changes)
    rows = our_rows(work, stage)
    config = stage.config

    def step() -> tuple[float, float]:
        batches = micro_batches(
            rows,
            pad_id=inputs.pad_id,
            max_tokens=config.batching.max_tokens_per_micro_batch,
            max_rows=config.batching.per_device_train_batch_size,
            packed=stage.packing,
            device=accelerator.device,
        )
        update = policy_step(
            accelerator,
            stage.policy,
            stage.optimizer,
            MixedBatch(rows=rows, micro_batches=batches, weights=stage.schedule.weights([])),
            stage.loss_settings,
        )
        return update.sums["loss"], update.grad_norm

    return step, stage.model
