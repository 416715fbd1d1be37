"""What a run says and does about a step's health: warnings, skipped updates, the end of a sick run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniapl.data.batching import Row
from uniapl.files import write_text
from uniapl.rewards import RewardOutcome
from uniapl.training.monitor import health
from uniapl.training.run import Run
from uniapl.training.stage import Stage
from uniapl.training.update.policy_step import PolicyStep
from uniapl.types import RolloutGroup

SKIPPED = "skipped"
"""Directory of a run: the batches of updates that were not applied."""
KEPT_BATCHES = 20
"""Of them, the newest: enough to see what they share. Our choice."""


def warn(run: Run, stage: Stage, record: dict[str, Any]) -> dict[str, int]:
    """Say and write which health rules begin to fire in this step; return those that fire, as metrics."""
    run.history = [*run.history[1 - 2 * run.longest_window :], record]
    # Another stage's discriminator and weights are another matter.
    here = [record for record in run.history if record["stage"] == stage.index]
    bounds = stage.config.objective.lambda_bounds
    found = health.warnings(here, stage.config.health, bounds=bounds)
    begun = sorted(found.keys() - run.warned)
    for name in begun:
        run.view.say(f"step {run.step}: warning: {found[name]}")
    run.health_log.write({"step": run.step, "rule": name, "message": found[name]} for name in begun)
    run.warned = set(found)
    run.view.warnings = found
    return {f"health/{name}": 1 for name in found}


def check_health(
    run: Run,
    stage: Stage,
    update: PolicyStep,
    outcomes: Mapping[str, Sequence[RewardOutcome]],
    groups: Sequence[RolloutGroup],
    learnt: Mapping[str, Any],
) -> str | None:
    """Say what went wrong in this step; return why the run must stop, when it has gone wrong for too long."""
    looked_at = {
        "update": _of_update(run, update),
        **_of_rewards(run, outcomes),
        **_of_discriminator(groups, learnt),
    }
    values = [value for parts in outcomes.values() for part in parts for value in part.values]
    if values and all(value is None for value in values) and not any(looked_at.values()):
        run.view.say(f"step {run.step}: no rollout has a reward: every function answered None")
    for name, complaint in looked_at.items():
        run.bad_steps[name] = run.bad_steps.get(name, 0) + 1 if complaint else 0
    for name, complaint in looked_at.items():
        if run.bad_steps[name] >= stage.config.health.max_skipped_steps:
            return (
                f"stopped after step {run.step}: {run.bad_steps[name]} steps in a row {complaint}. "
                "A checkpoint was saved; once mended, --resume auto goes on from it."
            )
    return None


def save_skipped(run: Run, update: PolicyStep, rows: Sequence[Row], weights: Mapping[str, float]) -> None:
    """Write the batch of an update that was not applied, for whoever looks for the cause."""
    if not run.accelerator.is_main_process:
        return
    decode = run.inputs.tokenizer.decode
    batch = {
        "step": run.step,
        "grad_norm": update.grad_norm,
        "sums": update.sums,
        "weights": dict(weights),
        "rows": [
            {
                "prompt": decode(list(row.prompt_ids)),
                "completion": decode(list(row.completion_ids)),
                **vars(row),
                "components": sorted(row.components),
            }
            for row in rows
        ],
    }
    path = skipped_path(run)
    path.parent.mkdir(exist_ok=True)
    # As Python reads it back, NaN and Infinity included: they are what is looked for.
    write_text(path, json.dumps(batch, ensure_ascii=False))
    for old in sorted(path.parent.glob("step-*.json"))[:-KEPT_BATCHES]:
        old.unlink()


def skipped_path(run: Run) -> Path:
    """Where the batch lies if this step's update was not applied."""
    return run.directory / SKIPPED / f"step-{run.step:06d}.json"


def _of_update(run: Run, update: PolicyStep) -> str | None:
    if update.applied:
        return None
    found = f"loss {update.sums['loss']}, gradient norm {update.grad_norm}"
    run.view.say(f"step {run.step}: {found}: update skipped, weights unchanged")
    return (
        f"the gradient was not finite ({found}; the batch is in {skipped_path(run)}); "
        "try a lower optim.learning_rate, and look for extreme rewards"
    )


def _of_rewards(run: Run, outcomes: Mapping[str, Sequence[RewardOutcome]]) -> dict[str, str | None]:
    """Each function that was asked -> what is wrong with it; one that applied to nothing is not looked at."""
    found: dict[str, str | None] = {}
    for name, parts in outcomes.items():
        message = next((part.message for part in parts if part.message is not None), None)
        if message is not None:
            failures = sum(sum(part.failed) for part in parts)
            run.view.say(f"step {run.step}: reward '{name}' failed on {failures} samples: {message}")
        tried = [
            bad for p in parts for bad, v in zip(p.failed, p.values, strict=True) if bad or v is not None
        ]
        if tried:
            dead = f"reward '{name}' failed on every sample: {message}"
            found[f"rewards/{name}"] = dead if all(tried) else None
    return found


def _of_discriminator(groups: Sequence[RolloutGroup], learnt: Mapping[str, Any]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    logits = [logit for group in groups for logit in group.policy_logits or ()]
    if logits:
        finite = any(map(health.is_number, logits))
        said = "the discriminator had no finite logit for any answer; lower discriminator.learning_rate"
        found["judgement"] = None if finite else said
    if learnt.get("discriminator/loss") is not None:
        applied = learnt["discriminator/updates"] > 0
        said = "the discriminator's gradient was not finite; lower discriminator.learning_rate"
        found["discriminator"] = None if applied else said
    return found
