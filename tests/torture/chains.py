"""A run that is killed, goes on, is killed again, until it ends by itself; then it must be the reference."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from torture import children, points
from torture.differences import differences, whole_checkpoints, wrong_checkpoints
from torture.setting import SAVE_STEPS, SAVES, Setting, forget, log_of
from uniapl.training.checkpoint import directory as checkpoint

AT_RANDOM = "random moment"
AT_START = "random moment of the start"
AS_COMMAND = "random moment, started by exec"
KILLED = -signal.SIGKILL
MOST_STARTS = 100
FINISHED_KILLS = 4
SAVES_PER_LIFE = 4
"""At most, between a start and a kill."""


@dataclass(kw_only=True)
class Chain:
    """A run with all its deaths."""

    run: Path
    as_command: bool
    """Started as a user does; otherwise in a fork, which is faster."""
    starts: int = 0
    kills: list[str] = field(default_factory=list)
    """Where each came."""
    went_back: int = 0
    """Starts from another checkpoint than the newest."""
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Promise:
    """What no kill may take away."""

    step: int
    """Of the newest whole checkpoint."""
    models: frozenset[str]
    """Those between stages and the final one that are whole."""

    @staticmethod
    def of(run: Path) -> "Promise":
        """What a run directory holds now."""
        steps = [checkpoint.step_of(path) for path in whole_checkpoints(run)]
        models = [*(run / "stages").glob("[0-9]*"), run / "final"]
        return Promise(max(steps, default=0), frozenset(p.name for p in models if not checkpoint.defects(p)))


def live(setting: Setting, seed: int, wanted: Sequence[str], *, as_command: bool = False) -> Chain:
    """Start a run, and again after each kill, until it ends.

    Args:
        wanted: Points to die at, in this order, between deaths at random moments. One that a start does not
            come to is not tried again.
    """
    rng = Random(seed)
    chain = Chain(run=setting.directory / f"chain-{seed}", as_command=as_command)
    pending = list(wanted)
    finished = False
    while not chain.complaints:
        if chain.starts == MOST_STARTS:
            chain.complaints.append(f"no end in {MOST_STARTS} starts")
            break
        point = pending.pop(0) if pending and (finished or rng.random() < 0.6) else None
        try:
            code = _life(setting, chain, rng, point)
        except TimeoutError as error:
            chain.complaints.append(str(error))
            break
        if code == 0:
            chain.complaints += differences(chain.run, setting.reference)
            if finished and not pending:
                break
            if not finished:
                # A run that is done is started again, and killed again: it has to stay as it is.
                finished, pending = True, rng.sample(points.POINTS, FINISHED_KILLS)
        elif code != KILLED:
            chain.complaints.append(f"exit code {code}")
    if not chain.complaints:
        forget(chain.run)
    return chain


def _life(setting: Setting, chain: Chain, rng: Random, point: str | None) -> int:
    """One start and its end, which is looked at if it was a kill; the return code."""
    before = Promise.of(chain.run)
    resume = "auto" if chain.starts else "never"
    whole = whole_checkpoints(chain.run)
    if len(whole) > 1 and rng.random() < 0.15:
        # The newest checkpoint and the steps after it are then of another future, and dropped.
        resume = str(whole[-2])
        before = Promise(checkpoint.step_of(whole[-2]), before.models)
        chain.went_back += 1
    chain.starts += 1
    arguments, log = setting.arguments(chain.run, resume=resume), log_of(chain.run)
    with log.open("a") as said:
        said.write(f"--- start {chain.starts}, --resume {resume}, to be killed {point or 'at random'}\n")
    if point is not None:
        where, arm = point, partial(points.arm, point, _number(setting, point, rng))
        code = children.wait(children.start(arguments, log, arm=arm))
    else:
        where, lines, seconds = _moment(setting, chain, rng)
        behind = _lines(log)
        pid = children.start(arguments, log, as_command=chain.as_command)
        seen: float | None = None

        def shoot(elapsed: float) -> bool:
            nonlocal seen
            if seen is None and _lines(log) >= behind + lines:
                seen = elapsed
            if seen is None or elapsed < seen + seconds:
                return False
            os.kill(pid, signal.SIGKILL)
            return True

        code = children.wait(pid, meanwhile=shoot)
    if code == KILLED:
        chain.kills.append(where)
        chain.complaints += wrong_checkpoints(chain.run, setting.every)
        now = Promise.of(chain.run)
        if now.step < before.step or not before.models <= now.models:
            chain.complaints.append(f"{before} before the kill, {now} after it")
    return code


def _number(setting: Setting, point: str, rng: Random) -> int:
    """The n of the n-th call: within a few saves, and often among the first, when a run starts."""
    calls = setting.calls[point.split()[1]]
    return rng.randint(1, rng.choice([3, max(3, round(SAVES_PER_LIFE * calls / SAVES))]))


def _moment(setting: Setting, chain: Chain, rng: Random) -> tuple[str, int, float]:
    """(what it is called, lines on the console to wait for, seconds to wait then).

    Lines, one of each step, go with the machine's pace; seconds alone would not.
    """
    where = AS_COMMAND if chain.as_command else AT_RANDOM
    if rng.random() < 0.2:
        if chain.as_command:
            return where, 0, rng.uniform(0, setting.command_seconds)
        return AT_START, 0, rng.uniform(0, setting.start_seconds)
    lines = setting.lines_of_start + rng.randrange(SAVES_PER_LIFE * SAVE_STEPS)
    return where, lines, rng.uniform(0, setting.save_seconds / SAVE_STEPS)


def _lines(log: Path) -> int:
    return log.read_bytes().count(b"\n")
