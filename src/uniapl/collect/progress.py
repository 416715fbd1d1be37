"""Progress of `uniapl collect`: a status line on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from uniapl.collect.cache import Reply

SECONDS_BETWEEN_LINES = 10.0


@dataclass(kw_only=True)
class Progress:
    """Counts of the requests of this run, and their cost."""

    total: int
    price_in: float | None = None
    """Price of a million prompt tokens."""
    price_out: float | None = None
    """Price of a million completion tokens."""
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def cost(self) -> float | None:
        """Cost in the currency of the prices; None without prices."""
        if self.price_in is None and self.price_out is None:
            return None
        cost = self.prompt_tokens * (self.price_in or 0) + self.completion_tokens * (self.price_out or 0)
        return cost / 1e6

    def line(self) -> str:
        """The current state in one line."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{self.done}/{self.total} requests", f"{self.completion_tokens / seconds:.0f} tokens/s"]
        if self.cost is not None:
            parts.append(f"cost {self.cost:.4f}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if 0 < self.done < self.total:
            left = round(seconds / self.done * (self.total - self.done))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(parts)


@contextlib.contextmanager
def counting(progress: Progress, console: Console) -> Iterator[Callable[[Reply | None], None]]:
    """A function that counts a reply, or None for a failed request, and shows the progress."""
    last = progress.started
    with console.status(progress.line()) as status:

        def count(reply: Reply | None) -> None:
            nonlocal last
            progress.done += 1
            progress.failed += reply is None
            if reply is not None:
                progress.prompt_tokens += reply.prompt_tokens
                progress.completion_tokens += reply.completion_tokens
            status.update(progress.line())
            if not console.is_terminal and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                console.print(progress.line(), markup=False)

        yield count
