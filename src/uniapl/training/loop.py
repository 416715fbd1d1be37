"""The training loop of a stage: sample, reward, score with the discriminator, mix, update the policy, update
the discriminator.

A method is only a set of weights; no branch depends on its name.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from uniapl.data.batching import Row, demonstration_rows, empty_micro_batch, micro_batches, shards
from uniapl.data.streams import Stream
from uniapl.models.token_states import TokenStates
from uniapl.training.distributed.fsdp import num_empty_micro_batches
from uniapl.training.monitor.console import hidden_columns
from uniapl.training.monitor.record import StepResult
from uniapl.training.oom_retry import read_in_parts, split_micro_batches, teach_in_parts
from uniapl.training.rollouts import collect_rollouts, gather
from uniapl.training.run import Run
from uniapl.training.stage import Stage
from uniapl.training.state_adversary import StateAdversary
from uniapl.training.update.accumulate import OutOfMemoryError
from uniapl.training.update.activation_checkpointing import activation_checkpointing
from uniapl.training.update.batch import MixedBatch
from uniapl.training.update.component_gradients import component_gradient_norms
from uniapl.training.update.credit import assign_credit, failed_groups, rollout_rows
from uniapl.training.update.pairs import pair_rejected, pair_rollouts, with_reference
from uniapl.training.update.policy_step import PolicyStep, policy_step
from uniapl.types import Example, RolloutGroup


def run_stage(run: Run, stage: Stage) -> None:
    """Train one stage, from its current step to its end.

    Raises:
        HealthStop: A health rule ended the run; a checkpoint was saved.
        Interrupted: A signal ended the run; a checkpoint was saved.
    """
    prompts, demonstrations = run.open_streams(stage)
    phase = run.view.phase
    run.view.hidden = hidden_columns(stage.config)
    while not stage.schedule.ended:
        run.view.start_step(run.step)
        stage.start_step()
        rollouts = collect_rollouts(run, stage, prompts)
        with phase("score"):
            groups, states = score_with_reference(run, stage, rollouts.groups)
            groups = score_with_discriminator(run, stage, groups, states)
            pair_metrics = stage.update_controllers(groups)
        with phase("update"):
            batch = mix(run, stage, groups, demonstrations, discarded=rollouts.discarded)
            batch = read_with_teacher(stage, batch)
            gradient_metrics = measure_gradients(run, stage, batch)
            update = update_policy(run, stage, batch)
        with phase("discriminator"):
            discriminator_metrics = update_discriminator(run, stage, groups)
        result = StepResult(
            groups=groups,
            discarded=rollouts.discarded,
            sampling_metrics=rollouts.metrics,
            outcomes=rollouts.outcomes,
            pair_metrics=pair_metrics,
            batch=batch,
            gradient_metrics=gradient_metrics,
            update=update,
            discriminator_metrics=discriminator_metrics,
        )
        run.finish_step(stage, result)


def score_with_reference(
    run: Run, stage: Stage, groups: Sequence[RolloutGroup]
) -> tuple[list[RolloutGroup], list[list[TokenStates]] | None]:
    """Add the reference's log-probabilities to the rollouts, for the KL, and to the demonstrations that are
    paired with them; each process reads its part.

    Returns:
        The groups, and the states of this process's rollouts, each group followed by its demonstration if the
        discriminator or the pairs need it; None in a step without a reference.
    """
    objective = stage.config.objective
    compares = isinstance(stage.adversary, StateAdversary) or objective.pairs_rollouts
    needed = stage.schedule.uses_reference and (objective.beta > 0 or compares)
    if stage.reader is None or not needed:
        return list(groups), None
    local = groups[run.accelerator.process_index :: run.accelerator.num_processes]
    sequences = [group.tokens(demonstration=compares) for group in local]
    reader = replace(stage.reader, max_tokens=run.max_tokens(stage))
    found = iter(read_in_parts(reader, [tokens for part in sequences for tokens in part]))
    states = [[next(found) for _ in part] for part in sequences]
    if not objective.uses_reference:
        return list(groups), states
    found_here = [[tuple(part.logprobs.tolist()) for part in parts] for parts in states]
    logprobs = gather(run.accelerator, found_here)
    return [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, ref_logprobs=values)
                for rollout, values in zip(group.rollouts, parts, strict=False)
            ),
            demonstration_ref_logprobs=parts[-1] if len(parts) > len(group.rollouts) else None,
        )
        for group, parts in zip(groups, logprobs, strict=True)
    ], states


def score_with_discriminator(
    run: Run, stage: Stage, groups: Sequence[RolloutGroup], states: list[list[TokenStates]] | None
) -> list[RolloutGroup]:
    """Add the discriminator's logits to the groups; each process scores its part.

    The logits are plain floats: no gradient flows from the discriminator to the policy. They act on the
    policy only through the advantages (`assign_credit`) and through lambda_adv.
    """
    if stage.adversary is None or not groups:
        return list(groups)
    local = groups[run.accelerator.process_index :: run.accelerator.num_processes]
    with (
        stage.adversary.gathered(),
        stage.gathered_policy() if stage.adversary.reads_policy else nullcontext(),
    ):
        logits = gather(run.accelerator, stage.adversary.score(local, states))
    return [
        replace(group, policy_logits=policy, expert_logit=expert)
        for group, (policy, expert) in zip(groups, logits, strict=True)
    ]


def mix(
    run: Run,
    stage: Stage,
    groups: Sequence[RolloutGroup],
    stream: Stream,
    *,
    discarded: Sequence[RolloutGroup] = (),
) -> MixedBatch:
    """Build the step's mixed batch, and collate this process's micro-batches."""
    config, accelerator, lambda_adv = stage.config, run.accelerator, stage.schedule.lambda_adv
    credits = assign_credit(
        groups,
        config.objective,
        expert_mean=stage.adversary.state.expert_mean if stage.adversary else None,
        lambda_adv=lambda_adv,
        reward_weights=run.inputs.rewarder.weights,
    )
    demonstrated: list[Example] = []
    weights = stage.schedule.weights(groups, discarded)
    if config.objective.mu_controller == "gate" and not stage.schedule.in_cold_start:
        failed = failed_groups(groups, config.objective.gate_threshold)
        credits = [c.without_rewards() if g in failed else c for g, c in zip(groups, credits, strict=True)]
        demonstrated = [group.example for group in failed]
    elif stage.schedule.imitates or config.objective.pairs_rejected:
        demonstrated = draw_demonstrations(run, stage, stream, [*groups, *discarded])
    rows = rollout_rows(
        groups,
        credits,
        temperature=config.rollout.temperature,
        mask_truncated=config.objective.mask_truncated_completions,
    )
    if weights["pref"] and config.objective.pairs_rollouts:
        rows = pair_rollouts(
            rows,
            groups,
            config.objective,
            is_rewarded=run.inputs.rewarder.applies_to,
            text_length=functools.partial(run.inputs.text_length, stop_strings=config.rollout.stop_strings),
        )
    if stage.schedule.imitates:
        rows += [row for example in demonstrated for row in demonstration_rows(example)]
    if weights["pref"] and config.objective.pairs_rejected and stage.reader is not None:
        rows += pair_rejected(demonstrated, temperature=stage.reader.temperature)
    # Rows whose gradient is 0 are left out; `MixedBatch.counts` still includes them.
    trained = [row for row in rows if row.has_gradient(weights)]
    local = shards(trained, accelerator.num_processes)[accelerator.process_index]
    batches = micro_batches(
        read_pairs_with_reference(run, stage, local),
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


def read_pairs_with_reference(run: Run, stage: Stage, rows: Sequence[Row]) -> list[Row]:
    """Add the reference's log-probabilities to the pairs of the data; those of rollouts have them already."""
    if stage.reader is None:
        return list(rows)
    reader = replace(stage.reader, max_tokens=run.max_tokens(stage))
    return with_reference(rows, lambda sequences: read_in_parts(reader, sequences))


def draw_demonstrations(
    run: Run, stage: Stage, stream: Stream, groups: Sequence[RolloutGroup]
) -> list[Example]:
    """The step's demonstrations: those of prompts that never passed (prompt_selection: informative), and the
    stream's next."""
    count = stage.schedule.demonstrations_per_step
    found: list[Example] = []
    # Prompts that never pass need not have a rejected completion.
    if stage.selects_prompts and stage.schedule.imitates and not stage.config.objective.pairs_rejected:
        examples = {group.example.prompt_ids: group.example for group in groups}
        rates = run.progress.pass_rates
        found = [e for e in examples.values() if e.demonstration_ids is not None and rates.never_passed(e)]
    return found[:count] + stream.take(max(0, count - len(found)))


def read_with_teacher(stage: Stage, batch: MixedBatch) -> MixedBatch:
    """Add the teacher's log-probabilities to this process's micro-batches, for the KL to the teacher."""
    if stage.teacher is None or not batch.counts["kl"]:
        return batch
    return replace(batch, micro_batches=teach_in_parts(stage.teacher, batch.micro_batches))


def measure_gradients(run: Run, stage: Stage, batch: MixedBatch) -> dict[str, float]:
    """Measure norms and cosines of the components' gradients every `log_gradients_steps` steps.

    Other steps return {}.
    """
    every = stage.config.log_gradients_steps
    if not every or stage.schedule.step % every:
        return {}
    with activation_checkpointing(stage.policy, stage.config.optim.gradient_checkpointing):
        while True:
            try:
                return component_gradient_norms(run.accelerator, stage.policy, batch, stage.loss_settings)
            except OutOfMemoryError:
                batch, _ = split_micro_batches(run, batch)


def update_policy(run: Run, stage: Stage, batch: MixedBatch) -> PolicyStep:
    """Take `num_iterations` optimizer steps on the batch, all with the old log-probabilities of the first.

    Returns:
        The last step's result; `applied` is True only if every step was applied.
    """
    old_logprobs: Sequence[Tensor] | None = None
    updates: list[PolicyStep] = []
    with activation_checkpointing(stage.policy, stage.config.optim.gradient_checkpointing):
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
    """Update the discriminator; return its metrics.

    It computes the logits again, with gradient; the floats in `groups` are not used.
    """
    if stage.adversary is None:
        return {}
    return stage.adversary.update(run.accelerator, groups, stage.config, run.step, stage.schedule.step)
