"""The method: sample, score, mix, update the policy, update the discriminator.

`run_stage` is the complete training loop. Weights and data decide which loss components have a gradient and
how large it is; no branch depends on a method's name.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from uniapl.data.batching import demonstration_row, empty_micro_batch, micro_batches, shards
from uniapl.data.streams import Stream
from uniapl.rewards import RewardOutcome
from uniapl.rollout import SampleRequest
from uniapl.training.distributed.fsdp import num_empty_micro_batches
from uniapl.training.monitor.record import StepResult
from uniapl.training.oom_retry import split_micro_batches
from uniapl.training.run import Run
from uniapl.training.stage import Stage
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.training.update.activation_checkpointing import recomputed
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.component_gradients import component_gradient_norms
from uniapl.training.update.credit import assign_credit, failed_prompts, rollout_rows
from uniapl.training.update.policy_step import PolicyStep, policy_step
from uniapl.types import Example, RolloutGroup, derive_seed


def run_stage(run: Run, stage: Stage) -> None:
    """Train one stage, from its current step to its end.

    Raises:
        HealthStop: A health rule ended the run; a checkpoint was saved.
        Interrupted: A signal ended the run; a checkpoint was saved.
    """
    prompts, demonstrations = run.open_streams(stage)
    phase = run.view.phase
    while not stage.schedule.ended:
        run.view.start_step(run.step)
        stage.start_step()
        with phase("rollout"):
            groups = sample(run, stage, prompts)
        with phase("reward"):
            groups, outcomes = reward(run, groups)
        with phase("score"):
            groups = score_with_discriminator(run, stage, groups)
            pairs = stage.adapt(groups)
        with phase("update"):
            batch = mix(run, stage, groups, demonstrations)
            gradients = measure_gradients(run, stage, batch)
            update = update_policy(run, stage, batch)
        with phase("discriminator"):
            discriminator = update_discriminator(run, stage, groups)
        result = StepResult(groups, outcomes, pairs, batch, gradients, update, discriminator)
        run.finish_step(stage, result)


def sample(run: Run, stage: Stage, stream: Stream) -> list[RolloutGroup]:
    """Sample rollouts for this process's part of the step's prompts, if a loss component uses rollouts."""
    if not stage.config.objective.uses_rollouts:
        return []
    process, processes = run.accelerator.process_index, run.accelerator.num_processes

    def request(prompts: Sequence[Example], step: int) -> SampleRequest:
        return SampleRequest(
            prompts=[prompt.prompt_ids for prompt in prompts[process::processes]],
            seeds=[
                derive_seed(run.config.seed, "rollout", step, slot)
                for slot in range(process, len(prompts), processes)
            ],
            num_generations=stage.config.rollout.num_generations,
            policy_version=run.step,
        )

    count = stage.config.batching.prompts_per_step
    prompts = stream.take(count)
    with stage.gathered_policy():
        rollouts = stage.sampler.sample(request(prompts, run.step))
        if stage.ahead is not None and stage.schedule.step + 1 < stage.config.max_steps:
            stage.ahead.begin(request(stream.peek(count), run.step + 1))
    decode = run.inputs.decode
    return [
        RolloutGroup(
            example=prompt,
            rollouts=group,
            texts=tuple(decode(rollout.completion_ids) for rollout in group),
            reward_parts={},
        )
        for prompt, group in zip(prompts[process::processes], rollouts, strict=True)
    ]


def reward(
    run: Run, groups: Sequence[RolloutGroup]
) -> tuple[list[RolloutGroup], dict[str, list[RewardOutcome]]]:
    """(groups of all processes with their rewards; outcomes of each reward function, one per process)."""
    rewarder = run.inputs.rewarder
    outcomes = rewarder.score(
        [group.example for group in groups for _ in group.rollouts],
        [text for group in groups for text in group.texts],
        [rollout.completion_ids for group in groups for rollout in group.rollouts],
    )
    ends = [0, *itertools.accumulate(len(group.rollouts) for group in groups)]
    combined = rewarder.combine(outcomes, ends[-1])
    rewarded = [
        replace(
            group,
            rewards=tuple(combined[start:end]),
            reward_parts={name: tuple(outcome.values[start:end]) for name, outcome in outcomes.items()},
        )
        for group, (start, end) in zip(groups, itertools.pairwise(ends), strict=True)
    ]
    everywhere = _gather(run.accelerator, [outcomes])
    return _gather(run.accelerator, rewarded), {name: [o[name] for o in everywhere] for name in outcomes}


def score_with_discriminator(run: Run, stage: Stage, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with the discriminator's logits; each process scores its part of them."""
    if stage.adversary is None:
        return list(groups)
    local = groups[run.accelerator.process_index :: run.accelerator.num_processes]
    # A frozen discriminator may use the policy's weights.
    with stage.adversary.gathered() if stage.adversary.trainer else stage.gathered_policy():
        logits = _gather(run.accelerator, stage.adversary.score(local))
    return [
        replace(group, policy_logits=policy, expert_logit=expert)
        for group, (policy, expert) in zip(groups, logits, strict=True)
    ]


def mix(run: Run, stage: Stage, groups: Sequence[RolloutGroup], stream: Stream) -> MixedBatch:
    """Combine rollouts and demonstrations, and make this process's micro-batches of them."""
    config, accelerator, lambda_adv = stage.config, run.accelerator, stage.schedule.lambda_adv
    credits = assign_credit(
        groups,
        scale_rewards=config.objective.scale_rewards,
        assignment=config.objective.adversarial_credit,
        expert_mean=stage.adversary.state.expert_mean if stage.adversary else None,
        bonus=lambda_adv if config.objective.adversarial_placement == "reward" else 0.0,
    )
    demonstrated: list[Example] = []
    if config.objective.mu_controller == "gate":
        failed = failed_prompts(groups, config.objective.gate_threshold)
        credits = [c.without_rewards() if g in failed else c for g, c in zip(groups, credits, strict=True)]
        demonstrated = [group.example for group in failed]
    elif config.objective.learns_from_demonstrations:
        demonstrated = stream.take(config.batching.demonstrations_per_step)
    rows = rollout_rows(groups, credits, temperature=config.rollout.temperature)
    rows += map(demonstration_row, demonstrated)
    weights = stage.schedule.weights(groups)
    trained = [row for row in rows if row.has_gradient(weights)] if stage.packing else rows
    batches = micro_batches(
        shards(trained, accelerator.num_processes)[accelerator.process_index],
        pad_id=run.inputs.pad_id,
        max_tokens=run.max_tokens(stage),
        max_rows=config.batching.per_device_train_batch_size,
        packed=stage.packing,
        device=accelerator.device,
    )
    for _ in range(num_empty_micro_batches(accelerator, len(batches))):
        batches.append(empty_micro_batch(run.inputs.pad_id, device=accelerator.device))
    return MixedBatch(
        rows=rows, micro_batches=batches, weights=weights, credits=credits, lambda_adv=lambda_adv
    )


def measure_gradients(run: Run, stage: Stage, batch: MixedBatch) -> dict[str, float]:
    """Norms and cosines of the loss components' gradients, every `log_gradients_steps`."""
    every = stage.config.log_gradients_steps
    if not every or stage.schedule.step % every:
        return {}
    with recomputed(stage.policy, stage.config.optim.gradient_checkpointing):
        while True:
            try:
                return component_gradient_norms(run.accelerator, stage.policy, batch, stage.loss_settings)
            except OutOfMemoryError:
                batch, _ = split_micro_batches(run, batch)


def update_policy(run: Run, stage: Stage, batch: MixedBatch) -> PolicyStep:
    """Make `num_iterations` updates on the batch, all with the first one's old log-probabilities.

    Returns:
        The last update, applied only if all of them were.
    """
    old_logprobs: Sequence[Tensor] | None = None
    updates: list[PolicyStep] = []
    with recomputed(stage.policy, stage.config.optim.gradient_checkpointing):
        while len(updates) < stage.config.objective.num_iterations:
            try:
                update = policy_step(
                    run.accelerator, stage.policy, stage.optimizer, batch, stage.loss_settings, old_logprobs
                )
            except OutOfMemoryError:
                batch, old_logprobs = split_micro_batches(run, batch, old_logprobs)
            else:
                old_logprobs = update.old_logprobs
                updates.append(update)
    return replace(updates[-1], applied=all(update.applied for update in updates))


def update_discriminator(run: Run, stage: Stage, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """Update the discriminator; return what to log."""
    if stage.adversary is None:
        return {}
    return stage.adversary.update(run.accelerator, groups, stage.config, run.step, stage.schedule.step)


def _gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all processes, in the order from which `[rank::world]` selected each process's."""
    if accelerator.num_processes == 1:
        return items
    everywhere = gather_object(
        [(position, accelerator.process_index, item) for position, item in enumerate(items)]
    )
    return [item for _, _, item in sorted(everywhere, key=lambda entry: entry[:2])]
