"""Ctrl-C and SIGTERM at random moments: the exit code says so, and the run goes on as if nothing had been."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torture import children
from torture.differences import differences, wrong_checkpoints
from torture.setting import LAST_STEP, SAVE_STEPS, Setting, forget, log_of, steps_done
from uniapl.training.checkpoint import directory as checkpoint


@dataclass(kw_only=True)
class Stop:
    """A run that was asked to end, and then went on."""

    run: Path
    signal: str
    code: int | None = None
    at_step: int = 0
    complaints: list[str] = field(default_factory=list)


def stop(setting: Setting, seed: int) -> Stop:
    """Ask a run to end by one of the two signals, look at what it left, and let it go on."""
    rng = Random(seed)
    number = (signal.SIGINT, signal.SIGTERM)[seed % 2]
    found = Stop(run=setting.directory / f"stop-{seed}", signal=number.name)
    log = log_of(found.run)
    step, patience = rng.randrange(LAST_STEP), rng.uniform(0, setting.save_seconds / SAVE_STEPS)
    pid = children.start(setting.arguments(found.run), log)
    reached: float | None = None

    def ask(elapsed: float) -> bool:
        nonlocal reached
        if reached is None and steps_done(found.run) >= step:
            reached = elapsed
        if reached is None or elapsed < reached + patience:
            return False
        os.kill(pid, number)
        return True

    found.code = children.wait(pid, meanwhile=ask)
    found.at_step = steps_done(found.run)
    # Before its first step a run has nothing to save, and Python's own handlers are in force.
    dies = {-number} if found.at_step == 0 else set()
    if found.code not in {0, 128 + number} | dies:
        found.complaints.append(f"{number.name} after step {step}: exit code {found.code}")
    if found.code == 128 + number and found.at_step:
        saved = checkpoint.checkpoint_path(found.run, found.at_step)
        found.complaints += [f"{saved.name}: {defect}" for defect in checkpoint.defects(saved)]
    found.complaints += wrong_checkpoints(found.run, setting.every)
    code = children.run(setting.arguments(found.run), log)
    if code:
        found.complaints.append(f"going on ended with {code}")
    else:
        found.complaints += differences(found.run, setting.every, moved=True)
    if not found.complaints:
        forget(found.run)
    return found
