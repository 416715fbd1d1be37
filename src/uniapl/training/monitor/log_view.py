"""Output of a run that is started from Python: records of the logger "uniapl"."""

import logging
from typing import Literal

from rich.console import Console

from uniapl.training.monitor import console
from uniapl.training.monitor.console import RunView

Show = console.Show | Literal["log"]
"""As in :mod:`console`, or "log": every line is a record of the logger "uniapl"."""


class _LogFile:
    """A text file for rich's console whose lines become log records."""

    def __init__(self) -> None:
        self._pending = ""

    def write(self, text: str) -> None:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            level = logging.WARNING if "warning: " in line else logging.INFO
            logging.getLogger("uniapl").log(level, "%s", line.rstrip())

    def flush(self) -> None:
        """Nothing: an incomplete line waits for its end."""


def make_view(num_steps: int, *, visible: bool, show: Show) -> RunView:
    """The view of a run: the console, the logger, or nothing."""
    if show != "log":
        return RunView(num_steps, visible=visible, show=show)
    view = RunView(num_steps, visible=visible, show="quiet")
    if visible:
        view.console = Console(file=_LogFile(), width=120, highlight=False, emoji=False)
    return view
