"""Output of a run that Python code starts: records of the logger "uniapl" instead of console lines."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import Console
from transformers.utils import logging as transformers_logging

from uniapl.training.monitor import console
from uniapl.training.monitor.console import RunView

Show = console.Show | Literal["log"]
"""As in :mod:`console`, or "log": every line is a record of the logger "uniapl"."""


class _LogFile:
    """The text file of a console whose lines become log records."""

    _pending = ""

    def write(self, text: str) -> None:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            level = logging.WARNING if "warning: " in line else logging.INFO
            logging.getLogger("uniapl").log(level, "%s", line.rstrip())

    def flush(self) -> None:
        """Do nothing: an incomplete line waits for its end."""


def make_view(num_steps: int, *, visible: bool, show: Show) -> RunView:
    """The view of a run: the console, the logger, or nothing."""
    if show != "log":
        return RunView(num_steps, visible=visible, show=show)
    view = RunView(num_steps, visible=visible, show="quiet")
    if visible:
        file: Any = _LogFile()
        view.console = Console(
            file=file, width=120, highlight=False, emoji=False, force_terminal=False, force_jupyter=False
        )
    return view


@contextlib.contextmanager
def progress_bars_hidden() -> Iterator[None]:
    """Within this context transformers shows no progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
