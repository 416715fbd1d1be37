"""How far it is: a bar on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from uniapl.collect.cache import Answer

SECONDS_BETWEEN_LINES = 10.0


@dataclass(kw_only=True)
class Progress:
    """What this run has asked for, and what it cost."""

    total: int
    price_in: float | None = None
    """Of a million tokens of prompts."""
    price_out: float | None = None
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def count(self, answer: Answer | None) -> None:
        """One more request has ended, with an answer or without."""
        self.done += 1
        if answer is None:
            self.failed += 1
        else:
            self.prompt_tokens += answer.prompt_tokens
            self.completion_tokens += answer.completion_tokens

    @property
    def cost(self) -> float | None:
        """In the prices' currency; None where no price was given."""
        if self.price_in is None and self.price_out is None:
            return None
        paid = self.prompt_tokens * (self.price_in or 0) + self.completion_tokens * (self.price_out or 0)
        return paid / 1e6

    def line(self) -> str:
        """Where it stands, in one line."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        parts = [f"{self.done}/{self.total} answers", f"{self.completion_tokens / seconds:.0f} tokens/s"]
        if self.cost is not None:
            parts.append(f"cost {self.cost:.4f}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if 0 < self.done < self.total:
            left = round(seconds / self.done * (self.total - self.done))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return ", ".join(parts)


@contextlib.contextmanager
def shown(progress: Progress, console: Console) -> Iterator[Callable[[Answer | None], None]]:
    """Count what one is told, and let the user see it."""
    last = progress.started
    with Bar(
        TextColumn("collect"),
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(progress.line(), total=progress.total)

        def count(answer: Answer | None) -> None:
            nonlocal last
            progress.count(answer)
            bar.update(task, completed=progress.done, description=progress.line())
            late = time.monotonic() - last >= SECONDS_BETWEEN_LINES
            if not console.is_terminal and (late or progress.done == progress.total):
                last = time.monotonic()
                console.print(progress.line(), markup=False)

        yield count
