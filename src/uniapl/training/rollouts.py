"""The rollouts of a step with their rewards, and the prompts that replace those that teach nothing."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from uniapl.config import Config
from uniapl.data.streams import Stream
from uniapl.rewards import RewardOutcome, extra_columns
from uniapl.rollout import SampleRequest
from uniapl.tools.environments import Episodes
from uniapl.training.run import Run
from uniapl.training.stage import Stage
from uniapl.training.update.credit import failed_groups, groups_without_advantage, known_passing
from uniapl.types import Example, RolloutGroup, derive_seed


@dataclass(kw_only=True)
class StepRollouts:
    """The rollouts of all processes in one step, with their rewards."""

    groups: list[RolloutGroup] = field(default_factory=list[RolloutGroup])
    """The groups that are trained, one per prompt of the step."""
    discarded: list[RolloutGroup] = field(default_factory=list[RolloutGroup])
    """The groups that were replaced."""
    outcomes: dict[str, list[RewardOutcome]] = field(default_factory=dict[str, list[RewardOutcome]])
    """Outcomes of each reward function for all groups, one per process."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """What was replaced and skipped."""


def collect_rollouts(run: Run, stage: Stage, stream: Stream) -> StepRollouts:
    """Sample and reward the step's rollouts.

    Groups without an advantage are replaced by those of the stream's next prompts, until each group has one
    or `max_resample_times` is reached. Every process takes the same decisions, from all rewards.
    """
    settings = stage.config.rollout
    waits = settings.max_resample_times > 0 or stage.selects_prompts
    found, position, drawn = StepRollouts(), stream.position, 0
    places = [*range(stage.schedule.prompts_per_step(stage.schedule.step))]
    for times in itertools.count():
        prompts = stream.take(len(places)) if stage.config.objective.uses_rollouts else []
        # A replacement has the seeds after those of the groups before it.
        start, drawn = drawn, drawn + len(prompts)
        with run.view.phase("rollout"):
            following = [] if waits else _following(stage, stream)
            local = sample(run, stage, prompts, start=start, following=following)
        with run.view.phase("reward"):
            groups, outcomes = reward(run, local)
        _join(found.outcomes, outcomes)
        if times == 0:
            found.groups = groups
        else:
            for place, group in zip(places, groups, strict=True):
                found.discarded.append(found.groups[place])
                found.groups[place] = group
        if stage.selects_prompts:
            for group in groups:
                run.progress.pass_rates.update(group.example, known_passing(group, stage.config.objective))
        places = _to_replace(run, stage, found)
        if times == settings.max_resample_times or not places:
            break
    if waits:
        # Rewards decide which prompts come next, so that they are known only now.
        with run.view.phase("rollout"):
            sample(run, stage, [], start=0, following=_following(stage, stream))
    found.metrics = _metrics(run, stage, found, skipped=stream.position - position - drawn)
    return found


def sample(
    run: Run, stage: Stage, prompts: Sequence[Example], *, start: int, following: Sequence[Example]
) -> list[RolloutGroup]:
    """Sample rollouts for this process's part of the prompts, and begin those of the next step.

    Args:
        start: Number of prompts that the step has sampled before, which determines the seeds.
        following: The next step's prompts, if a server samples them while this step trains.
    """
    process, processes = run.accelerator.process_index, run.accelerator.num_processes
    environment, count = run.inputs.environment, stage.config.rollout.num_generations
    mine = prompts[process::processes]
    episodes = Episodes(environment=environment, examples=mine, count=count) if environment else None

    def request(examples: Sequence[Example], step: int, start: int = 0) -> SampleRequest:
        return SampleRequest(
            prompts=[example.prompt_ids for example in examples[process::processes]],
            seeds=[
                derive_seed(run.config.seed, "rollout", step, start + slot)
                for slot in range(process, len(examples), processes)
            ],
            num_generations=count,
            policy_version=run.step,
        )

    if not prompts and not following:
        return []
    with stage.gathered_policy():
        wanted = replace(request(prompts, run.step, start), begin=episodes.begin if episodes else None)
        rollouts = stage.sampler.sample(wanted) if prompts else []
        if stage.one_step_off is not None and following:
            stage.one_step_off.begin(request(following, run.step + 1))
    decode = run.inputs.decode
    return [
        RolloutGroup(
            example=prompt,
            rollouts=group,
            texts=tuple(decode(rollout.completion_ids) for rollout in group),
            reward_parts={},
            environments=instances,
        )
        for prompt, group, instances in zip(
            mine, rollouts, episodes.instances if episodes else [()] * len(rollouts), strict=True
        )
    ]


def _following(stage: Stage, stream: Stream) -> list[Example]:
    """The next step's prompts, if they are sampled while this step trains."""
    step = stage.schedule.step + 1
    config = stage.config
    if stage.one_step_off is None or step >= config.max_steps or not config.objective.uses_rollouts:
        return []
    return stream.peek(stage.schedule.prompts_per_step(step))


def _to_replace(run: Run, stage: Stage, found: StepRollouts) -> list[int]:
    """Places of the groups that another prompt's may replace: without an advantage, and their demonstration
    neither takes their place (mu_controller: gate) nor is compared with them (pref_pairs: rollouts)."""
    config, schedule, groups = stage.config, stage.schedule, found.groups
    if not config.rollout.max_resample_times or not groups:
        return []
    if not schedule.weights(groups, found.discarded)["rl"]:
        return []
    useless = groups_without_advantage(groups, config.objective, run.inputs.rewarder.weights)
    gated = config.objective.mu_controller == "gate" and not schedule.in_cold_start
    kept = {id(group) for group in failed_groups(groups, config.objective.gate_threshold) if gated}
    if config.objective.pairs_rollouts:
        kept |= {id(group) for group in useless if _has_pairs(group, config)}
    replaced = {id(group) for group in useless} - kept
    return [place for place, group in enumerate(groups) if id(group) in replaced]


def _has_pairs(group: RolloutGroup, config: Config) -> bool:
    """Whether a rollout fails and can be compared with the demonstration."""
    shown = group.example.demonstration_ids is not None
    return shown and not all(known_passing(group, config.objective))


def _metrics(run: Run, stage: Stage, found: StepRollouts, *, skipped: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if stage.config.rollout.max_resample_times and found.groups:
        metrics |= {
            "discarded/groups": len(found.discarded),
            "discarded/rollouts": sum(len(group.rollouts) for group in found.discarded),
            "tokens/discarded": sum(group.completion_tokens for group in found.discarded),
        }
    if stage.selects_prompts and found.groups:
        metrics |= {"prompts/skipped": skipped, **run.progress.pass_rates.metrics()}
    return metrics


def reward(
    run: Run, groups: Sequence[RolloutGroup]
) -> tuple[list[RolloutGroup], dict[str, list[RewardOutcome]]]:
    """Score the rollouts. Return the groups of all processes with their rewards, and each reward function's
    outcomes, one per process."""
    rewarder = run.inputs.rewarder
    update_trainer_state(run)
    outcomes = rewarder.score(
        [group.example for group in groups for _ in group.rollouts],
        [
            list(rollout.messages) or text
            for group in groups
            for rollout, text in zip(group.rollouts, group.texts, strict=True)
        ],
        [rollout.completion_ids for group in groups for rollout in group.rollouts],
        [environment for group in groups for environment in group.environments]
        if run.inputs.environment
        else None,
    )
    ends = [0, *itertools.accumulate(len(group.rollouts) for group in groups)]
    combined = rewarder.combine(outcomes, ends[-1])
    rewarded = [
        replace(
            group,
            # The instances stay in this process, and are not needed any more.
            environments=(),
            rewards=tuple(combined[start:end]),
            reward_parts={name: tuple(outcome.values[start:end]) for name, outcome in outcomes.items()},
            extra={column: tuple(values[start:end]) for column, values in extra_columns(outcomes).items()},
        )
        for group, (start, end) in zip(groups, itertools.pairwise(ends), strict=True)
    ]
    everywhere = gather(run.accelerator, [outcomes])
    return gather(run.accelerator, rewarded), {name: [o[name] for o in everywhere] for name in outcomes}


def update_trainer_state(run: Run) -> None:
    """Set what reward functions read from `trainer_state` to the run's current step, as TRL does."""
    state = run.inputs.rewarder.trainer_state
    state.global_step, state.epoch = run.step, run.progress.streams["prompts"].epoch
    state.log_history = run.health.history
    state.is_world_process_zero = run.accelerator.is_main_process
    state.is_local_process_zero = run.accelerator.is_local_main_process


def _join(outcomes: dict[str, list[RewardOutcome]], new: Mapping[str, list[RewardOutcome]]) -> None:
    """Add the outcomes of further samples to those of each function and process."""
    for name, parts in new.items():
        before = outcomes.setdefault(name, [])
        outcomes[name] = [a.followed_by(b) for a, b in zip(before, parts, strict=True)] if before else parts


def gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """Gather items from all processes, and undo the `[rank::world_size]` split."""
    if accelerator.num_processes == 1:
        return items
    everywhere = gather_object(
        [(position, accelerator.process_index, item) for position, item in enumerate(items)]
    )
    return [item for _, _, item in sorted(everywhere, key=lambda entry: entry[:2])]
