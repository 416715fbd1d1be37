"""What a person sees while a run goes on: the phase it is in, and a line per step."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

# Column -> metric key -> format. Only metrics that a step has are shown.
COLUMNS = (
    ("reward", "reward", ".3f"),
    ("loss", "loss", ".2f"),
    ("nll", "sft/nll", ".2f"),
    ("win", "discriminator/win_rate", ".2f"),
    ("mu", "weight/mu", ".2f"),
    ("lam", "weight/lambda_adv", ".2f"),
    ("len", "completions/mean_length", ".1f"),
    ("s", "step_time", ".1f"),
)


class RunView(contextlib.AbstractContextManager["RunView"]):
    """A progress bar on a terminal, plain lines elsewhere; silent on all processes but the first.

    It also keeps the time: `times` holds the seconds of each phase of the current step.
    """

    def __init__(self, total_steps: int, *, visible: bool) -> None:
        self.console = Console(quiet=not visible, highlight=False)
        self.times: dict[str, float] = {}
        self.current = ""
        """The phase that is going on, or that an error has ended."""
        self._total = total_steps
        self._started = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (visible and self.console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("start", total=total_steps)

    def __enter__(self) -> "RunView":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start_step(self, done: int) -> None:
        """A new step begins; `done` of them are behind. The time of a save belongs to the step after it."""
        self.times = {name: seconds for name, seconds in self.times.items() if name == "save"}
        self._started = time.monotonic()
        self._progress.update(self._task, completed=done)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is going on, and add its seconds to `times`."""
        self._progress.update(self._task, description=f"{name:<13}")
        self.current = name
        begin = time.monotonic()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.monotonic() - begin

    @property
    def step_seconds(self) -> float:
        """Since `start_step`."""
        return time.monotonic() - self._started

    def step_line(self, step: int, metrics: dict[str, Any]) -> None:
        """One line with the step's main numbers, within 80 columns for up to 99 steps."""
        shown = [
            f"{title} {metrics[key]:{form}}" for title, key, form in COLUMNS if metrics.get(key) is not None
        ]
        self.say(f"{step:>{len(str(self._total))}}/{self._total} " + " ".join(shown))

    def say(self, message: str) -> None:
        """A line above the progress bar."""
        self.console.print(message, markup=False, soft_wrap=True)
