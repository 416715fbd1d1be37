"""The run that is tortured: everything in it that has state, and what it is when nothing disturbs it."""

import json
import shutil
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from support.tiny import letter_rows, save_model
from torture import children, points
from torture.differences import differences

STEPS = (7, 38)
"""Of the two stages."""
LAST_STEP = sum(STEPS)
SAVE_STEPS = 3
# Every third step, the end of the first stage, and the last step, which here is a third one.
SAVES = LAST_STEP // SAVE_STEPS + 1
RECIPE: dict[str, Any] = {
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "stages": [{"method": "sft", "max_steps": STEPS[0]}, {"method": "uniapl", "max_steps": STEPS[1]}],
    "rewards": {"functions": ["lowercase"]},
    "rollout": {"num_generations": 4, "max_completion_length": 6},
    "objective": {
        "mu_peak": 0.6,
        "mu_warmup_steps": 3,
        "mu_decay_steps": 20,
        "beta": 0.05,
        "reference_step": 5,
        "num_iterations": 2,
        "lambda_adv": 0.5,
        "lambda_controller": "dual",
    },
    # It never pauses, so that its optimizer has something to lose at every step.
    "discriminator": {
        "warmup_steps": 1,
        "min_accuracy": 0.0,
        "accuracy_band": [0.0, 1.0],
        "learning_rate": 1e-3,
        "replay_size": 8,
        "replay_fraction": 0.5,
    },
    "optim": {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 4},
    "batching": {"prompts_per_step": 3, "demonstrations_per_step": 3, "max_tokens_per_micro_batch": 120},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A recipe on disk, the runs that others are compared with, and how long such a run takes."""

    directory: Path
    recipe: Path
    calls: dict[str, int] = field(default_factory=dict)
    """Point's function -> how often a run calls it."""
    start_seconds: float = 0
    """Until the first step is done."""
    command_seconds: float = 0
    """The same for `python -m uniapl.cli`, which has to load everything first."""
    lines_of_start: int = 0
    """On the console, before the first step's."""
    save_seconds: float = 0
    """From one save to the next."""

    @property
    def reference(self) -> Path:
        """The run that nothing disturbed."""
        return self.directory / "reference"

    @property
    def every(self) -> Path:
        """The same with a checkpoint of every step, none of them deleted."""
        return self.directory / "every"

    def arguments(self, run: Path, *, resume: str = "auto") -> list[str]:
        """The command line of a run in the directory `run`."""
        return ["train", str(self.recipe), "--output-dir", str(run), "--resume", resume]


def make_setting(directory: Path) -> Setting:
    """Write model, data and recipe, and run the references."""
    logging.disable_progress_bar()
    save_model(directory / "model")
    data = directory / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(10)))
    recipe = directory / "recipe.yaml"
    where = {"model": {"model_name_or_path": str(directory / "model")}, "data": {"path": str(data)}}
    recipe.write_text(yaml.safe_dump(RECIPE | where))
    setting = Setting(directory=directory, recipe=recipe)
    counts = directory / "calls.json"
    every = [*setting.arguments(setting.every), "--save-steps", "1", "--save-total-limit", "1000"]
    _finish(children.start(every, log_of(setting.every)))
    arguments = setting.arguments(setting.reference)
    began = time.monotonic()
    pid = children.start(arguments, log_of(setting.reference), arm=partial(points.count, counts))
    started = _first_step(setting.reference, began)
    _finish(pid)
    whole = time.monotonic() - began
    command = directory / "command"
    began = time.monotonic()
    pid = children.start(setting.arguments(command), log_of(command), as_command=True)
    command_started = _first_step(command, began)
    _finish(pid)
    found = differences(setting.reference, setting.every, moved=True)
    found += differences(command, setting.reference)
    assert not found, f"undisturbed runs differ: {found}"
    said = log_of(setting.reference).read_text().splitlines()
    return replace(
        setting,
        calls=json.loads(counts.read_text()),
        start_seconds=started,
        command_seconds=command_started,
        lines_of_start=next(n for n, line in enumerate(said) if f"1/{LAST_STEP} " in line),
        save_seconds=(whole - started) / SAVES,
    )


def log_of(run: Path) -> Path:
    """Where a run's processes say what they say."""
    return run.with_suffix(".log")


def forget(run: Path) -> None:
    """Delete a run that was right."""
    shutil.rmtree(run)
    log_of(run).unlink()


def steps_done(run: Path) -> int:
    """Whole lines of metrics.jsonl."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _first_step(run: Path, began: float) -> float:
    while not steps_done(run):
        assert time.monotonic() - began < children.PATIENCE, "the reference does not start"
        time.sleep(0.01)
    return time.monotonic() - began


def _finish(pid: int) -> None:
    code = children.wait(pid)
    assert code == 0, f"a run that nothing disturbs ended with {code}"
