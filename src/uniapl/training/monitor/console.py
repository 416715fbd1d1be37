"""Console output of a run: the current phase, a line per step, and sampled completions."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from uniapl.config import Config
from uniapl.files import json_line
from uniapl.types import prompt_text

Show = Literal["text", "quiet"] | Callable[[str], None]
"""All output; none; or a function that gets each step's metrics as a line of JSON (messages go to stderr)."""

# Columns are two spaces apart. Those whose metric a step does not have are left out. docs/first-run.md
# explains each one.
LINE = (
    "reward {reward:.3f}  loss {loss:.2f}  nll {sft/nll:.2f}  acc {rewards/accuracies:.2f}  "
    "teacher {loss/teacher:.2f}  win {discriminator/win_rate:.2f}  adv {adversary/reward_change:.2f}  "
    "mu {weight/mu:.2f}  lam {weight/lambda_adv:.2f}  len {completions/mean_length:.1f}  "
    "tools {tools/call_frequency:.2f}  s {step_time:.1f}"
)
ROWS = {
    "completions": "reward {reward:.3f}  pass {pass_rate:.2f}  length {completions/mean_length:.1f}  "
    "ratio {completions/length_ratio:.2f}  entropy {rollout/entropy_estimate:.2f}",
    "tools": "calls {tools/call_frequency:.2f}  failed {tools/failure_frequency:.2f}  "
    "malformed {tools/malformed:.2f}  unanswered {tools/unanswered:.2f}",
    "demonstrations": "loss {loss/sft:.3f}  mu {weight/mu:.2f}  tokens {tokens/sft:,}",
    "preferences": "loss {loss/pref:.3f}  accuracy {rewards/accuracies:.2f}  margin {rewards/margins:.2f}  "
    "tokens {tokens/pref:,}",
    "teacher": "loss {loss/teacher:.3f}",
    "rewards": "loss {loss/rl:.3f}  weight {weight/rl:.2f}  tokens {tokens/rl:,}",
    "adversary": "loss {loss/adv:.3f}  lambda {weight/lambda_adv:.2f}  tokens {tokens/adv:,}  "
    "win rate {discriminator/win_rate:.2f}  change {adversary/reward_change:.2f}",
}
"""The table below the progress bar on a terminal."""
TOKENS = {
    "demonstrations": "tokens/sft",
    "preferences": "tokens/pref",
    "rewards": "tokens/rl",
    "adversary": "tokens/adv",
}
"""A loss component without tokens has no row: it had no effect in this step."""
SHOWN_CHARACTERS = 240
"""Maximum length of a shown prompt or completion: three lines of a terminal. Our choice."""


def hidden_columns(config: Config) -> frozenset[str]:
    """The columns of a line that are constant in a stage, because its method does not use what they show."""
    objective = config.objective
    weighs = config.imitates and (objective.learns_from_rewards or objective.mu_peak != objective.mu_valley)
    return frozenset(name for name, used in (("mu", weighs), ("lam", objective.lambda_adv > 0)) if not used)


class RunView(contextlib.AbstractContextManager["RunView"]):
    """Console of the first process: lines, and on a terminal a live table below them.

    It also measures time: `times` holds the seconds of each phase of the current step.
    """

    def __init__(self, total_steps: int, *, visible: bool, show: Show = "text") -> None:
        self._json = None if isinstance(show, str) or not visible else show
        self.console = Console(
            quiet=not visible or show == "quiet",
            highlight=False,
            stderr=not isinstance(show, str),
            emoji=False,
        )
        self.times: dict[str, float] = {}
        self.current = ""
        """The current phase, or the one in which an error was raised."""
        self.warnings: Mapping[str, str] = {}
        """Rule -> message of the health rules that fire."""
        self.hidden: frozenset[str] = frozenset()
        """Columns of a line that are not printed."""
        self._total = total_steps
        self._started = time.monotonic()
        self._metrics: Mapping[str, Any] = {}
        self._progress = Progress(
            *(SpinnerColumn(), "{task.description}", BarColumn(bar_width=20), MofNCompleteColumn()),
            *("{task.fields[pace]}", "left", TimeRemainingColumn()),
            console=self.console,
        )
        self._task = self._progress.add_task("start", total=total_steps, pace="")
        self._live = Live(get_renderable=self._table, console=self.console, transient=True)

    def __enter__(self) -> "RunView":
        if self.console.is_terminal and not self.console.quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def start_step(self, done: int) -> None:
        """Begin a step after `done` others. The time of a save counts for the step after it."""
        self.times = {name: seconds for name, seconds in self.times.items() if name == "save"}
        self._started = time.monotonic()
        self._progress.update(self._task, completed=done)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show the phase's name, and add its seconds to `times`."""
        self._progress.update(self._task, description=f"{name:<13}")
        self.current = name
        begin = time.monotonic()
        try:
            yield
        finally:
            self.times[name] = self.times.get(name, 0.0) + time.monotonic() - begin

    @property
    def step_seconds(self) -> float:
        """Seconds since `start_step`."""
        return time.monotonic() - self._started

    def step_done(self, step: int, metrics: Mapping[str, Any], *, line: bool) -> None:
        """Show a step's metrics; with `line`, also print them.

        A line of the method uniapl without tools has at most 100 characters for up to 999 steps.
        """
        self._metrics = metrics
        self._progress.update(self._task, pace=f"{metrics['step_time']:.1f} s/step")
        if self._json is not None:
            self._json(json_line(metrics))
        elif line:
            shown = [column for column in _filled(LINE, metrics) if column.split()[0] not in self.hidden]
            self.say(f"{step:>{len(str(self._total))}}/{self._total} {' '.join(shown)}")

    def completions(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Print two sampled completions (see `record.completion_records`) with their demonstrations."""
        shown = [record for record in records if record["demonstration"] is not None] or records
        table = Table.grid(padding=(0, 1))
        for record in shown[:2]:
            completion = record["completions"][0]
            reward = "" if completion["reward"] is None else f" {completion['reward']:.2f}"
            for title, text in (
                ("  prompt", prompt_text(record["prompt"])),
                (f"  policy{reward}", completion["text"]),
                ("  expert", record["demonstration"]),
            ):
                if text is not None:
                    table.add_row(Text(title, style="dim"), Text(_shortened(text)))
        self.console.print(table)

    def say(self, message: str) -> None:
        """Print a line above the table."""
        self.console.print(message, markup=False, soft_wrap=True)

    def _table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for title, columns in ROWS.items():
            numbers = _filled(columns, self._metrics)
            if numbers and (title not in TOKENS or self._metrics.get(TOKENS[title])):
                table.add_row(Text(title, style="dim"), Text("  ".join(numbers)))
        for name, message in self.warnings.items():
            table.add_row(Text(name, style="yellow"), Text(message))
        return Group(self._progress, table)


def _filled(columns: str, metrics: Mapping[str, Any]) -> list[str]:
    """The columns whose metric is known."""
    found: list[str] = []
    for column in columns.split("  "):
        with contextlib.suppress(KeyError, TypeError):  # TypeError: the metric is None
            found.append(column.format_map(metrics))
    return found


def _shortened(text: str) -> str:
    """The text on one line, without control characters, at most SHOWN_CHARACTERS long."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= SHOWN_CHARACTERS else flat[: SHOWN_CHARACTERS - 1] + "…"
