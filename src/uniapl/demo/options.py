"""The options of `uniapl demo` that are not keys of a recipe."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from uniapl.demo.recipe import REWARDS
from uniapl.errors import UsageError

TASKS = {
    "sentences": "texts that satisfy constraints (default)",
    "tools": "questions whose answers need a look-up table and a calculator",
}
"""Name of a task -> its description."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options."""

    task: str
    reward: str
    write: str | None
    """Directory for the files of the task; None trains."""


def demo_options(flags: Sequence[str]) -> tuple[DemoOptions, list[str]]:
    """The options, and the flags that are keys of the recipe.

    Raises:
        UsageError: A task or a reward does not exist, or a value is missing.
    """
    parser = argparse.ArgumentParser(prog="uniapl demo", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?", default="sentences", const="")
    parser.add_argument("--write", nargs="?", const="")
    parser.add_argument("--reward", nargs="?", default="honest", const="")
    options, rest = parser.parse_known_args(flags)
    if options.task not in TASKS:
        raise UsageError(f"--task: unknown task '{options.task}': choose one of {', '.join(TASKS)}")
    if options.reward not in REWARDS:
        raise UsageError(f"--reward: unknown reward '{options.reward}': choose one of {', '.join(REWARDS)}")
    if options.task == "tools" and options.reward != "honest":
        raise UsageError(f"--reward {options.reward} is for --task sentences: remove one of the two")
    if options.write == "":
        raise UsageError("--write needs a directory")
    return DemoOptions(task=options.task, reward=options.reward, write=options.write), rest
