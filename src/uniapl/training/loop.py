"""The algorithm: sample, score, mix, update the policy, update the discriminator.

`run_stage` is the method. Which forces act, and how strongly, is decided by numbers alone: a weight of zero,
a batch without demonstrations, a run without a discriminator. There is no branch on a method's name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from uniapl.data.batching import (
    Row,
    component_counts,
    demonstration_row,
    empty_micro_batch,
    micro_batches,
    shares,
)
from uniapl.data.streams import Stream
from uniapl.errors import HealthStop
from uniapl.rewards import RewardOutcome
from uniapl.training.distributed.fsdp import num_empty_micro_batches
from uniapl.training.inputs import streams
from uniapl.training.monitor import metrics
from uniapl.training.oom_retry import retry_on_oom
from uniapl.training.run import Run, finish_step
from uniapl.training.stage import Stage
from uniapl.training.step_health import check_health, save_skipped, warn
from uniapl.training.update.activation_checkpointing import recomputed
from uniapl.training.update.component_gradients import component_gradient_norms
from uniapl.training.update.credit import Credit, assign_credit, failed_prompts, rollout_rows
from uniapl.training.update.policy_step import PolicyStep, policy_step
from uniapl.types import Example, MicroBatch, RolloutGroup, derive_seed


@dataclass(frozen=True, kw_only=True)
class MixedBatch:
    """What one step learns from: demonstrations and rollouts together."""

    rows: list[Row]
    """Of all processes."""
    batches: list[MicroBatch]
    """This process's share, padded."""
    counts: dict[str, int]
    """Tokens per component, over all processes."""
    weights: dict[str, float]
    """Of each component's term."""
    lambda_adv: float
    """In force, as a term's weight or inside the rewards' advantages."""
    credits: list[Credit]
    tokens: int


def run_stage(run: Run, stage: Stage) -> None:
    """The method, step by step.

    Raises:
        HealthStop: A health rule ended the run, after a checkpoint.
        Interrupted: A signal did, after a checkpoint too.
    """
    phase = run.view.phase
    prompts, demonstrations = _streams(run, stage)
    while not stage.ended:
        run.view.start_step(run.step)
        learning_rate = stage.set_learning_rate()
        stage.set_reference()
        with phase("rollout"):
            groups = sample(run, stage, prompts)
        with phase("reward"):
            groups, outcomes = reward(run, groups)
        with phase("score"):
            groups = score_with_discriminator(run, stage, groups)
            pairs = stage.pair_metrics(groups)
            constraint = stage.control(pairs.get("discriminator/pair_win_rate"))
        with phase("update"):
            batch = mix(run, stage, groups, demonstrations)
            forces = measure_gradients(run, stage, batch)
            update = update_policy(run, stage, batch)
        with phase("discriminator"):
            learnt = update_discriminator(run, stage, groups)

        stage.step += 1
        run.step += 1
        run.num_tokens += batch.tokens
        stage.tokens += batch.tokens
        record = {
            "step": run.step,
            "stage": stage.index,
            **metrics.update_metrics(update, batch.counts, batch.weights),
            "weight/lambda_adv": batch.lambda_adv,
            **forces,
            **metrics.rollout_metrics(groups, batch.credits, step=run.step - 1),
            **metrics.length_metrics(groups),
            **pairs,
            **constraint,
            **learnt,
            **metrics.reward_health(outcomes),
            "learning_rate": learning_rate,
            "epoch": (prompts if groups else demonstrations).epoch,
            "num_tokens": run.num_tokens,
            "skipped": int(not update.applied),
        }
        record |= warn(run, stage, record)
        if not update.applied:
            save_skipped(run, update, batch.rows, batch.weights)
        complaint = check_health(run, stage, update, outcomes, groups, learnt)
        completions = metrics.completion_records(run.step, groups, batch.credits)
        # Looked at once: a signal that comes after the save waits for the next step's.
        interrupted = run.asked_to_stop()
        stopping = bool(complaint or interrupted)
        finish_step(run, stage, record, completions, stopping=stopping)
        if complaint:
            raise HealthStop(complaint)
        if interrupted:
            raise run.interrupted()


def sample(run: Run, stage: Stage, stream: Stream) -> list[RolloutGroup]:
    """This process's share of the step's prompts with their rollouts; nothing where no force needs them."""
    if not stage.config.objective.uses_rollouts:
        return []
    process, processes = run.accelerator.process_index, run.accelerator.num_processes

    def asked(prompts: Sequence[Example], step: int) -> dict[str, Any]:
        return {
            "prompts": [prompt.prompt_ids for prompt in prompts[process::processes]],
            "seeds": [
                derive_seed(run.config.seed, "rollout", step, slot)
                for slot in range(process, len(prompts), processes)
            ],
            "num_generations": stage.config.rollout.num_generations,
            "policy_version": run.step,
        }

    count = stage.config.batching.prompts_per_step
    prompts = stream.take(count)
    with stage.gathered_policy():
        rollouts = stage.sampler.sample(**asked(prompts, run.step))
        if stage.ahead is not None and stage.step + 1 < stage.config.max_steps:
            stage.ahead.begin(**asked(stream.peek(count), run.step + 1))
    decode = run.inputs.tokenizer.decode
    return [
        RolloutGroup(
            example=prompt,
            rollouts=group,
            texts=tuple(str(decode(list(r.completion_ids), skip_special_tokens=True)) for r in group),
            reward_parts={},
        )
        for prompt, group in zip(prompts[process::processes], rollouts, strict=True)
    ]


def reward(
    run: Run, groups: Sequence[RolloutGroup]
) -> tuple[list[RolloutGroup], dict[str, list[RewardOutcome]]]:
    """All processes' groups with their rewards, in the prompts' order, and how the functions fared."""
    rewarder = run.inputs.rewarder
    samples = [(group, i) for group in groups for i in range(len(group.rollouts))]
    outcomes = rewarder.score(
        [group.example for group, _ in samples],
        [group.texts[i] for group, i in samples],
        [group.rollouts[i].completion_ids for group, i in samples],
    )
    combined = rewarder.combine(outcomes, len(samples))
    rewarded: list[RolloutGroup] = []
    offset = 0
    for group in groups:
        span = slice(offset, offset + len(group.rollouts))
        parts = {name: tuple(outcome.values[span]) for name, outcome in outcomes.items()}
        rewarded.append(replace(group, rewards=tuple(combined[span]), reward_parts=parts))
        offset = span.stop
    everywhere = _gather(run.accelerator, [outcomes])
    return _gather(run.accelerator, rewarded), {name: [o[name] for o in everywhere] for name in outcomes}


def score_with_discriminator(run: Run, stage: Stage, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with the discriminator's logits; its cadence takes the fresh pairs into account."""
    if stage.adversary is None:
        return list(groups)
    share = groups[run.accelerator.process_index :: run.accelerator.num_processes]
    # A frozen one may read the policy.
    with stage.adversary.gathered() if stage.adversary.learner else stage.gathered_policy():
        scored = stage.adversary.score(share)
    logits = _gather(run.accelerator, scored)
    judged = [
        replace(group, policy_logits=policy, expert_logit=expert)
        for group, (policy, expert) in zip(groups, logits, strict=True)
    ]
    experts = [expert for _, expert in logits if expert is not None and math.isfinite(expert)]
    # Where some demonstrations are kept from it, those say what it knows of the expert.
    watched = "held_out_accuracy" if stage.config.discriminator.held_out_fraction else "accuracy"
    stage.adversary.state.observe(
        accuracy=stage.pair_metrics(judged).get(f"discriminator/{watched}"),
        expert_logit=sum(experts) / len(experts) if experts else None,
        band=stage.config.discriminator.accuracy_band,
    )
    return judged


def mix(run: Run, stage: Stage, groups: Sequence[RolloutGroup], stream: Stream) -> MixedBatch:
    """Credit the rollouts, add the step's demonstrations, and cut this process's share into micro-batches."""
    config, accelerator = stage.config, run.accelerator
    in_reward = config.objective.adversarial_placement == "reward"
    credits = assign_credit(
        groups,
        scale_rewards=config.objective.scale_rewards,
        assignment=config.objective.adversarial_credit,
        expert_mean=stage.adversary.state.expert_mean if stage.adversary else None,
        bonus=stage.lambda_adv if in_reward else 0.0,
    )
    if config.objective.mu_controller == "gate":
        failed = failed_prompts(groups, config.objective.gate_threshold)
        credits = [c.without_rewards() if g in failed else c for g, c in zip(groups, credits, strict=True)]
        demonstrated = [demonstration_row(group.example) for group in failed]
    elif config.objective.learns_from_demonstrations:
        taken = stream.take(config.batching.demonstrations_per_step)
        demonstrated = [demonstration_row(example) for example in taken]
    else:
        demonstrated = []
    rows = rollout_rows(groups, credits, temperature=config.rollout.temperature) + demonstrated
    weights = stage.weights(stage.mu(groups))
    learnt = [row for row in rows if row.has_gradient(weights)] if stage.packing else rows
    batches = micro_batches(
        shares(learnt, accelerator.num_processes)[accelerator.process_index],
        pad_id=run.inputs.pad_id,
        max_tokens=run.max_tokens(stage),
        max_rows=config.batching.per_device_train_batch_size,
        packed=stage.packing,
        device=accelerator.device,
    )
    for _ in range(num_empty_micro_batches(accelerator, len(batches))):
        batches.append(empty_micro_batch(run.inputs.pad_id, device=accelerator.device))
    return MixedBatch(
        rows=rows,
        batches=batches,
        counts=component_counts(rows),
        weights=weights,
        lambda_adv=stage.lambda_adv,
        credits=credits,
        tokens=sum(len(row.completion_ids) for row in rows),
    )


def measure_gradients(run: Run, stage: Stage, batch: MixedBatch) -> dict[str, float]:
    """Norms of the three forces' gradients and the cosines between them, in the steps that are looked at."""
    every = stage.config.log_gradients_steps
    if not every or stage.step % every:
        return {}
    with recomputed(stage.policy, stage.config.optim.gradient_checkpointing):
        forces, _ = retry_on_oom(
            run,
            batch.batches,
            None,
            lambda batches, _: component_gradient_norms(
                run.accelerator,
                stage.policy,
                batches,
                batch.counts,
                batch.weights,
                token_weight=stage.config.objective.sft_token_weight,
                importance_cap=stage.config.rollout.importance_cap,
            ),
        )
    return forces


def update_policy(run: Run, stage: Stage, batch: MixedBatch) -> PolicyStep:
    """The updates on the mixed batch; from the second on, the first one's log-probs are the old ones.

    Returns:
        The last update; `applied` only if all of them were.
    """
    objective = stage.config.objective

    def step(batches: list[MicroBatch], old_logprobs: Sequence[Tensor] | None) -> PolicyStep:
        return policy_step(
            run.accelerator,
            stage.policy,
            stage.optimizer,
            batches,
            batch.counts,
            batch.weights,
            clip_low=objective.epsilon,
            clip_high=objective.clip_high,
            token_weight=objective.sft_token_weight,
            max_grad_norm=stage.config.optim.max_grad_norm,
            reference=stage.reference,
            old_logprobs=old_logprobs,
            importance_cap=stage.config.rollout.importance_cap,
        )

    batches, update = batch.batches, None
    all_applied = True
    with recomputed(stage.policy, stage.config.optim.gradient_checkpointing):
        for _ in range(objective.num_iterations):
            update, batches = retry_on_oom(run, batches, update.old_logprobs if update else None, step)
            all_applied &= update.applied
    assert update is not None
    return replace(update, applied=all_applied)


def update_discriminator(run: Run, stage: Stage, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """The discriminator's updates of this step, and what to log of them."""
    if stage.adversary is None:
        return {}
    return stage.adversary.learn(run.accelerator, groups, stage.config, run.step, stage.step)


def _gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all processes, dealt back in the order in which `[rank::world]` took them."""
    if accelerator.num_processes == 1:
        return items
    everywhere = gather_object(
        [(position, accelerator.process_index, item) for position, item in enumerate(items)]
    )
    return [item for _, _, item in sorted(everywhere, key=lambda entry: entry[:2])]


def _streams(run: Run, stage: Stage) -> tuple[Stream, Stream]:
    """The stage's prompts and demonstrations, at the positions that the run has reached."""
    pools = streams(stage.config, run.inputs.dataset, run.inputs.rewarder)
    for name, pool in zip(("prompts", "demonstrations"), pools, strict=True):
        position = run.streams[name].position
        run.streams[name] = Stream(pool, seed=run.config.seed, name=name, position=position)
    return run.streams["prompts"], run.streams["demonstrations"]
