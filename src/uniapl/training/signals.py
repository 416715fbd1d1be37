"""Ctrl-C and SIGTERM end a run after the step in progress."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from accelerate.utils import gather_object


@dataclass
class StopSignal:
    """The signal that asked the run to stop."""

    number: int = 0
    """0 until a signal arrives."""

    def received(self) -> bool:
        """Whether any process has received a signal; all processes call it in the same step."""
        self.number = max(gather_object([self.number]))
        return bool(self.number)

    @contextlib.contextmanager
    def handled(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within this context the first signal is recorded and the second one ends the program."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.number:
                raise KeyboardInterrupt
            self.number = number
            say(
                "Interrupted: finishing this step and saving a checkpoint. "
                "Press Ctrl-C again to exit immediately."
            )

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
