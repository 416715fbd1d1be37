"""Health of a run's steps: warnings, skipped updates, and when a run must stop."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniapl.config import Config
from uniapl.files import JsonlLog, write_text
from uniapl.rewards import RewardOutcome
from uniapl.training.inputs import RunInputs
from uniapl.training.monitor import health
from uniapl.training.monitor.console import RunView
from uniapl.training.monitor.record import StepResult
from uniapl.training.update.policy_step import PolicyStep
from uniapl.types import RolloutGroup

SKIPPED = "skipped"
"""Directory of a run: the batches of updates that were not applied."""
KEPT_BATCHES = 20
"""Newest skipped batches that are kept, enough to see what they have in common. Our choice."""


@dataclass(kw_only=True)
class RunHealth:
    """The health rules of a run, with the records of the last steps."""

    view: RunView
    log: JsonlLog
    """health.jsonl: each rule when it begins to fire, with its message."""
    skipped: Path
    """Directory of the skipped batches."""
    window: int
    """The longest window of the health rules, over all stages."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of the last steps, oldest first."""
    bad_steps: dict[str, int] = field(default_factory=dict)
    """Consecutive bad steps of "update" (the policy's), "discriminator" (its update), "judgement" (its
    logits) and each "rewards/<name>"; state.json contains these names."""

    def __post_init__(self) -> None:
        last = self.history[-1] if self.history else {}
        self._firing = {key.removeprefix("health/") for key in last if key.startswith("health/")}

    @property
    def last_record(self) -> dict[str, Any]:
        """Metrics of the last step."""
        return dict(self.history[-1]) if self.history else {}

    def warn(self, record: dict[str, Any], config: Config, stage_step: int) -> dict[str, int]:
        """Report the rules that begin to fire in this step; return all that fire, as metrics.

        Args:
            stage_step: Finished steps of the stage.
        """
        self.history = [*self.history[1 - 2 * self.window :], record]
        # Another stage has another discriminator and other weights.
        stage = [before for before in self.history if before["stage"] == record["stage"]]
        found = health.warnings(stage, config, stage_step=stage_step)
        begun = sorted(found.keys() - self._firing)
        for name in begun:
            self.view.say(f"step {record['step']}: warning: {found[name]}")
        self.log.write({"step": record["step"], "rule": name, "message": found[name]} for name in begun)
        self._firing = set(found)
        self.view.warnings = found
        return {f"health/{name}": 1 for name in found}

    def check(self, step: int, result: StepResult, max_bad_steps: int) -> str | None:
        """Report the errors of this step; return why the run must stop if one persists too long."""

        def say(message: str) -> None:
            self.view.say(f"step {step}: {message}")

        problems = {
            "update": self._of_update(step, result.update, say),
            **_of_rewards(result.outcomes, say),
            **_of_discriminator(result.groups, result.discriminator_metrics),
        }
        values = [value for parts in result.outcomes.values() for part in parts for value in part.values]
        if values and all(value is None for value in values) and not any(problems.values()):
            say("no rollout has a reward: every reward function returned None")
        for name, problem in problems.items():
            self.bad_steps[name] = self.bad_steps.get(name, 0) + 1 if problem else 0
        for name, problem in problems.items():
            if self.bad_steps[name] >= max_bad_steps:
                return (
                    f"stopped after step {step}: {self.bad_steps[name]} steps in a row: {problem}. "
                    "A checkpoint was saved; fix the cause and continue with --resume auto"
                )
        return None

    def save_skipped(self, step: int, result: StepResult, inputs: RunInputs) -> None:
        """Write the batch of an update that was not applied, for debugging."""
        if not self.log.enabled:
            return
        decode = inputs.tokenizer.decode
        batch = {
            "step": step,
            "grad_norm": result.update.grad_norm,
            "sums": result.update.sums,
            "weights": result.batch.weights,
            "rows": [
                {
                    "prompt": decode(list(row.prompt_ids)),
                    "completion": decode(list(row.completion_ids)),
                    **vars(row),
                    "chosen": row.chosen and decode(list(row.chosen.completion_ids)),
                    "components": sorted(row.components),
                }
                for row in result.batch.rows
            ],
        }
        self.skipped.mkdir(exist_ok=True)
        # Python's JSON, which keeps NaN and Infinity: they are the cause to look for.
        write_text(self.skipped / f"step-{step:06d}.json", json.dumps(batch, ensure_ascii=False))
        for old in sorted(self.skipped.glob("step-*.json"))[:-KEPT_BATCHES]:
            old.unlink()

    def _of_update(self, step: int, update: PolicyStep, say: Callable[[str], None]) -> str | None:
        if update.applied:
            return None
        found = f"loss {update.sums['loss']}, gradient norm {update.grad_norm}"
        say(f"{found}: update skipped, weights unchanged")
        return (
            f"the gradient was not finite ({found}; the batch is in {self.skipped}/step-{step:06d}.json); "
            "try a lower optim.learning_rate, and check the rewards for extreme values"
        )


def _of_rewards(
    outcomes: Mapping[str, Sequence[RewardOutcome]], say: Callable[[str], None]
) -> dict[str, str | None]:
    """The problem of each reward function that applied to a sample."""
    found: dict[str, str | None] = {}
    for name, parts in outcomes.items():
        message = next((part.message for part in parts if part.message is not None), None)
        failed = [bad for part in parts for bad in part.failed]
        values = [value for part in parts for value in part.values]
        if message is not None:
            say(f"reward '{name}' failed on {sum(failed)} samples: {message}")
        applied = [bad for bad, value in zip(failed, values, strict=True) if bad or value is not None]
        if applied:
            every = f"reward '{name}' failed on every sample: {message}"
            found[f"rewards/{name}"] = every if all(applied) else None
    return found


def _of_discriminator(groups: Sequence[RolloutGroup], metrics: Mapping[str, Any]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    remedy = "lower discriminator.learning_rate"
    logits = [logit for group in groups for logit in group.policy_logits or ()]
    if logits:
        problem = f"the discriminator had no finite logit for any completion; {remedy}"
        found["judgement"] = None if any(map(health.is_number, logits)) else problem
    if metrics.get("discriminator/loss") is not None:
        problem = f"the discriminator's gradient was not finite; {remedy}"
        found["discriminator"] = None if metrics["discriminator/updates"] > 0 else problem
    return found
