"""The algorithm: sample, score, mix, update the policy, update the discriminator.

`run_stage` is the method. Which forces act, and how strongly, is decided by numbers alone (`Stage.weights`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from uniapl.batching import component_counts, demonstration_row, micro_batches
from uniapl.config import Config
from uniapl.data import Stream
from uniapl.errors import HealthStop
from uniapl.resolve import Resolved, load_recipe, resolve, stages_of
from uniapl.rewards import RewardOutcome
from uniapl.train import checkpoint, metrics, setup
from uniapl.train.console import RunView
from uniapl.train.credit import assign_credit, rollout_rows
from uniapl.train.setup import Materials
from uniapl.train.stage import Stage, build_stage
from uniapl.train.step import PolicyStep, policy_step
from uniapl.types import Example, RolloutGroup, derive_seed


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    output_dir: Path
    final_dir: Path
    """The trained model, as `transformers` loads it."""
    steps: int
    metrics: dict[str, Any]
    """Of the last step."""


@dataclass(kw_only=True)
class Run:
    """What all stages of a run share."""

    config: Config
    accelerator: Accelerator
    materials: Materials
    directory: Path
    view: RunView
    streams: dict[str, Stream]
    metrics_log: metrics.JsonlLog
    completions_log: metrics.JsonlLog
    step: int = 0
    """Steps done, over all stages."""
    num_tokens: int = 0
    """Tokens of completions that losses were computed on, demonstrations included."""
    skipped_steps: int = 0
    """Updates in a row that were not applied."""
    failed_rewards: dict[str, int] = field(default_factory=dict)
    """Reward function -> steps in a row in which every one of its calls failed."""
    last_metrics: dict[str, Any] = field(default_factory=dict)


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] = (),
) -> RunResult:
    """Train, from the first step or from a checkpoint, and leave the result in `output_dir`.

    Args:
        config: A configuration, a mapping with the same keys, or the path of a YAML recipe.
        train_dataset: Rows (a `datasets.Dataset`, a list of dicts), instead of `data.path`.
        reward_functions: Plain callables with TRL's signature, beside those that the configuration names.

    Raises:
        UsageError: The configuration, the data or the model cannot work; nothing was trained.
        HealthStop: A health rule ended the run; a checkpoint was saved.
    """
    if isinstance(config, (str, Path)):
        config = load_recipe(config)
    if isinstance(config, Config):
        config = config.model_dump(exclude_unset=True)
    return train_resolved(
        resolve(dict(config)), train_dataset=train_dataset, reward_functions=reward_functions
    )


def train_resolved(
    resolved: Resolved,
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] = (),
) -> RunResult:
    """:func:`train` for a configuration whose values have been resolved."""
    config = resolved.config
    stages = stages_of(resolved)
    materials = setup.load_materials(
        resolved, stages, train_dataset=train_dataset, reward_functions=reward_functions
    )
    bf16 = config.optim.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # One optimizer step per backward window of ours: accelerate must neither count nor divide.
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=1)
    set_seed(config.seed)
    view = RunView(sum(s.config.max_steps for s in stages), visible=accelerator.is_main_process)
    directory = Path(config.output_dir)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            setup.prepare_run_directory(resolved, stages, materials)
    for note in resolved.notes:
        view.say(f"note: {note}")
    found = checkpoint.find_checkpoint(directory, config.resume, view.say)
    state = (
        json.loads((found / "state.json").read_text(encoding="utf-8")) if found else {"stage": 0, "step": 0}
    )
    run = _start_run(config, accelerator, materials, directory, view, state)
    model = setup.load_model(config.model, found).to(accelerator.device)
    setup.check_vocabulary(model, materials.tokenizer)
    view.say(f"resumed at step {run.step} from {found}" if found else f"run directory: {directory}")
    stage: Stage | None = None
    with view:
        for index in range(state["stage"], len(stages)):
            start = directory / "stages" / str(index) if index else None
            stage = build_stage(stages[index].config, index, model, materials, accelerator, start=start)
            if found and index == state["stage"]:
                stage.load(found, state)
            run_stage(run, stage)
            if index + 1 < len(stages):
                _save_model(run, stage, directory / "stages" / str(index + 1))
                accelerator.free_memory()
        assert stage is not None
        _save_model(run, stage, directory / "final")
    view.say(f"{run.step} steps done; model: {directory / 'final'}; metrics: {run.metrics_log.path}")
    return RunResult(
        output_dir=directory, final_dir=directory / "final", steps=run.step, metrics=run.last_metrics
    )


def run_stage(run: Run, stage: Stage) -> None:
    """The method, step by step."""
    config, objective, batching = stage.config, stage.config.objective, stage.config.batching
    accelerator, view, adversary = run.accelerator, run.view, stage.adversary
    prompts, demonstrations = _examples_of(run, stage)
    while stage.step < config.max_steps:
        view.start_step(run.step)
        weights = stage.weights()

        groups: list[RolloutGroup] = []
        outcomes: dict[str, list[RewardOutcome]] = {}
        if objective.uses_rollouts:
            with view.phase("rollout"):
                groups = sample(run, stage, prompts.take(batching.prompts_per_step))
            with view.phase("reward"):
                groups, outcomes = reward(run, groups)
        if adversary is not None:
            with view.phase("score"):
                groups = judge(run, stage, groups)

        with view.phase("update"):
            credits = assign_credit(
                groups,
                scale_rewards=objective.scale_rewards,
                assignment=objective.adversarial_assignment,
                expert_mean=adversary.state.expert_mean if adversary else None,
            )
            rows = rollout_rows(groups, credits, temperature=config.rollout.temperature)
            if objective.learns_from_demonstrations:
                rows += map(demonstration_row, demonstrations.take(batching.demonstrations_per_step))
            counts = component_counts(rows)
            share = rows[accelerator.process_index :: accelerator.num_processes]
            batches = micro_batches(
                share,
                pad_id=run.materials.pad_id,
                max_tokens=batching.max_tokens,
                max_rows=batching.per_device_train_batch_size,
                device=accelerator.device,
            )
            update: PolicyStep | None = None
            for _ in range(objective.num_iterations):
                update = policy_step(
                    accelerator,
                    stage.policy,
                    stage.optimizer,
                    batches,
                    counts,
                    weights,
                    clip_low=objective.epsilon,
                    clip_high=objective.clip_high,
                    token_weight=objective.sft_token_weight,
                    max_grad_norm=config.optim.max_grad_norm,
                    reference=stage.reference,
                    old_logprobs=update.old_logprobs if update else None,
                )
        assert update is not None

        learnt: dict[str, Any] = {}
        if adversary is not None:
            with view.phase("discriminator"):
                learnt = adversary.learn(accelerator, groups, config, run.step)

        stage.scheduler.step()
        stage.step += 1
        run.step += 1
        run.num_tokens += sum(len(row.completion_ids) for row in rows)
        record = {
            "step": run.step,
            "stage": stage.index,
            **metrics.update_metrics(update, counts, weights),
            **metrics.rollout_metrics(groups, credits),
            **metrics.pair_metrics(groups),
            **learnt,
            **metrics.reward_health(outcomes),
            "learning_rate": stage.scheduler.get_last_lr()[0],
            "epoch": prompts.epoch if objective.uses_rollouts else demonstrations.epoch,
            "num_tokens": run.num_tokens,
            "skipped": int(not update.applied),
        }
        complaint = _check_health(run, stage, update, outcomes)
        _finish_step(
            run,
            stage,
            record,
            metrics.completion_records(run.step, groups, credits),
            save=run.step % run.config.save_steps == 0 or stage.step == config.max_steps or bool(complaint),
        )
        if complaint:
            raise HealthStop(complaint)


def sample(run: Run, stage: Stage, prompts: Sequence[Example]) -> list[RolloutGroup]:
    """This process's share of the prompts, each with its rollouts."""
    slots = range(len(prompts))[run.accelerator.process_index :: run.accelerator.num_processes]
    rollouts = stage.sampler.sample(
        [prompts[slot].prompt_ids for slot in slots],
        seeds=[derive_seed(run.config.seed, "rollout", run.step, slot) for slot in slots],
        num_generations=stage.config.rollout.num_generations,
        policy_version=run.step,
    )
    decode = run.materials.tokenizer.decode
    return [
        RolloutGroup(
            example=prompts[slot],
            rollouts=group,
            texts=tuple(str(decode(list(r.completion_ids), skip_special_tokens=True)) for r in group),
            reward_parts={},
        )
        for slot, group in zip(slots, rollouts, strict=True)
    ]


def reward(
    run: Run, groups: Sequence[RolloutGroup]
) -> tuple[list[RolloutGroup], dict[str, list[RewardOutcome]]]:
    """All processes' groups with their rewards, in the prompts' order, and how the functions fared."""
    rewarder = run.materials.rewarder
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


def judge(run: Run, stage: Stage, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with the discriminator's logits; its cadence takes the fresh pairs into account."""
    assert stage.adversary is not None
    share = groups[run.accelerator.process_index :: run.accelerator.num_processes]
    logits = _gather(run.accelerator, stage.adversary.judge(share))
    judged = [
        replace(group, policy_logits=policy, expert_logit=expert)
        for group, (policy, expert) in zip(groups, logits, strict=True)
    ]
    experts = [expert for _, expert in logits if expert is not None]
    stage.adversary.state.observe(
        accuracy=metrics.pair_metrics(judged).get("discriminator/accuracy"),
        expert_logit=sum(experts) / len(experts) if experts else None,
        band=stage.config.discriminator.accuracy_band,
    )
    return judged


def _gather(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all processes, dealt back in the order in which `[rank::world]` took them."""
    if accelerator.num_processes == 1:
        return items
    everywhere = gather_object(
        [(position, accelerator.process_index, item) for position, item in enumerate(items)]
    )
    return [item for _, _, item in sorted(everywhere, key=lambda entry: entry[:2])]


def _examples_of(run: Run, stage: Stage) -> tuple[Stream, Stream]:
    """The stage's prompts and demonstrations, at the positions that the run has reached."""
    pools = setup.streams(stage.config, run.materials.dataset, run.materials.rewarder)
    for name, pool in zip(("prompts", "demonstrations"), pools, strict=True):
        position = run.streams[name].position
        run.streams[name] = Stream(pool, seed=run.config.seed, name=name, position=position)
    return run.streams["prompts"], run.streams["demonstrations"]


def _start_run(
    config: Config,
    accelerator: Accelerator,
    materials: Materials,
    directory: Path,
    view: RunView,
    state: dict[str, Any],
) -> Run:
    def log(name: str) -> metrics.JsonlLog:
        return metrics.JsonlLog(
            directory / name, last_step=state["step"], enabled=accelerator.is_main_process
        )

    return Run(
        config=config,
        accelerator=accelerator,
        materials=materials,
        directory=directory,
        view=view,
        streams={
            name: Stream((), seed=config.seed, name=name, position=state.get(name, 0))
            for name in ("prompts", "demonstrations")
        },
        metrics_log=log("metrics.jsonl"),
        completions_log=log("completions.jsonl"),
        step=state["step"],
        num_tokens=state.get("num_tokens", 0),
        skipped_steps=state.get("skipped_steps", 0),
        failed_rewards=state.get("failed_rewards", {}),
    )


def _finish_step(
    run: Run, stage: Stage, record: dict[str, Any], completions: list[dict[str, Any]], *, save: bool
) -> None:
    """Write the step to both files and the console, then save if that is due.

    In this order: a run that dies while saving goes on from the checkpoint before and drops these lines.
    """
    record |= {f"time/{name}": seconds for name, seconds in run.view.times.items()}
    record["step_time"] = run.view.step_seconds
    run.last_metrics = record
    run.metrics_log.write([record])
    run.completions_log.write(completions)
    if run.step % run.config.logging_steps == 0 or stage.step == stage.config.max_steps:
        run.view.step_line(run.step, record)
    if save:
        with run.view.phase("save"):
            save_checkpoint(run, stage)


def save_checkpoint(run: Run, stage: Stage) -> None:
    """Everything that the run needs to go on as if it had never stopped."""

    def fill(directory: Path) -> None:
        stage.model.save_pretrained(directory)
        run.materials.tokenizer.save_pretrained(directory)
        state = {
            "step": run.step,
            "num_tokens": run.num_tokens,
            "skipped_steps": run.skipped_steps,
            "failed_rewards": run.failed_rewards,
            **{name: stream.position for name, stream in run.streams.items()},
            **stage.save(directory),
        }
        (directory / "state.json").write_text(json.dumps(state), encoding="utf-8")

    if run.accelerator.is_main_process:
        checkpoint.write_directory(checkpoint.checkpoint_path(run.directory, run.step), fill)
        checkpoint.prune(run.directory, run.config.save_total_limit)
    run.accelerator.wait_for_everyone()


def _save_model(run: Run, stage: Stage, path: Path) -> None:
    """The policy and its tokenizer, as `transformers` loads them."""

    def fill(directory: Path) -> None:
        stage.model.save_pretrained(directory)
        run.materials.tokenizer.save_pretrained(directory)

    if run.accelerator.is_main_process:
        checkpoint.write_directory(path, fill)
    run.accelerator.wait_for_everyone()


def _check_health(
    run: Run, stage: Stage, update: PolicyStep, outcomes: Mapping[str, Sequence[RewardOutcome]]
) -> str | None:
    """Say what went wrong in this step; return why the run must stop, when it has gone wrong for too long."""
    complaints: list[tuple[int, str]] = []
    run.skipped_steps = 0 if update.applied else run.skipped_steps + 1
    if run.skipped_steps:
        found = f"loss {update.sums['loss']}, gradient norm {update.grad_norm}"
        run.view.say(f"step {run.step}: {found}: update skipped, weights unchanged")
        remedy = "try a lower optim.learning_rate, and look for extreme rewards"
        complaints.append((run.skipped_steps, f"the gradient was not finite ({found}); {remedy}"))
    for name, parts in outcomes.items():
        message = next((part.message for part in parts if part.message), None)
        if message:
            failures = sum(sum(part.failed) for part in parts)
            run.view.say(f"step {run.step}: reward '{name}' failed on {failures} samples: {message}")
        dead = any(part.failed for part in parts) and all(all(part.failed) for part in parts)
        run.failed_rewards[name] = run.failed_rewards.get(name, 0) + 1 if dead else 0
        if dead:
            complaints.append(
                (run.failed_rewards[name], f"reward '{name}' failed on every sample: {message}")
            )
    for steps, complaint in complaints:
        if steps >= stage.config.health.max_skipped_steps:
            return (
                f"stopped after step {run.step}: {steps} steps in a row {complaint}. "
                "A checkpoint was saved; once mended, --resume auto goes on from it."
            )
    return None
