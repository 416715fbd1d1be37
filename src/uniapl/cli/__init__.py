"""The command line: one table of verbs. The module of a verb is imported when the verb is used."""

import contextlib
import difflib
import gc
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from uniapl.errors import UniAPLError, UsageError
from uniapl.files import expand_home

# Libraries read these when they are first imported. A link to pydantic's documentation does not explain an
# error in a recipe, and progress bars for loaded files would break the display of a run.
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@dataclass(frozen=True)
class Verb:
    """One verb; `uniapl.cli.<verb>` defines a function with the verb's name that takes the arguments."""

    usage: str
    summary: str
    on_interrupt: str = "interrupted: everything after the last checkpoint is lost"
    """Message for Ctrl-C."""


VERBS = {
    "demo": Verb("[--task NAME] [--key value ...]", "train on a small bundled task, in minutes"),
    "init": Verb("CASE [-o DIRECTORY]", "write a first recipe with its reward and example rows"),
    "recipes": Verb("[-o DIRECTORY]", "list or copy the recipes that come with the package"),
    "compare": Verb(
        "RECIPE.yaml --methods a,b",
        "compare methods on a recipe at equal budget, with intervals",
        "interrupted; finished cells are kept, and the same command continues with the others",
    ),
    "train": Verb("RECIPE.yaml [--key value ...]", "train with a recipe (--quiet; --json for scripts)"),
    "check": Verb("RECIPE.yaml [--key value ...]", "check a recipe without training (--json for scripts)"),
    "evaluate": Verb(
        "MODEL --suites ifeval ...",
        "score a model on IFEval, IFBench or your own files",
        "interrupted; nothing was written",
    ),
    "report": Verb("RUN ... [-o FILE]", "write an HTML report of one or several runs"),
    "chat": Verb("MODEL", "chat with a model, line by line"),
    "export": Verb(
        "RUN -o DIRECTORY ...",
        "write a run's model, with an adapter merged, or upload it to the Hub",
        "interrupted; the run is unchanged",
    ),
    "compose": Verb("PROMPTS -o TRAIN.jsonl", "combine prompts with checkable instructions"),
    "collect": Verb(
        "PROMPTS -o TRAIN.jsonl",
        "generate demonstrations with an OpenAI-compatible endpoint",
        "interrupted; completions received so far are kept, and the same command continues with the others",
    ),
    "pretrain-discriminator": Verb("DATA ...", "train a POLAR discriminator on completions of policies"),
}

OTHER_VERBS = {
    **dict.fromkeys(("sft", "grpo", "rlhf", "dpo", "run", "fit", "finetune"), "train"),
    **dict.fromkeys(("eval", "test", "lm-eval"), "evaluate"),
    **dict.fromkeys(("validate", "lint", "preprocess", "dry-run"), "check"),
    **dict.fromkeys(("merge", "merge-lora", "save", "push", "upload"), "export"),
    **dict.fromkeys(("infer", "inference", "generate"), "chat"),
    **dict.fromkeys(("distill", "sample"), "collect"),
    **dict.fromkeys(("new", "create", "quickstart", "template"), "init"),
}
"""Names of other programs for a verb."""
HELP_FLAGS = ("-h", "--help", "--help-all")
EXIT_CODES = """\
exit codes: 0 ok, 1 failed, 2 usage, configuration or data error,
            3 stopped by a health rule, 130 or 143 interrupted
"""
HELP = f"""\
usage: uniapl VERB ...
       uniapl --version

One-stage post-training of language models: demonstrations, rewards and an adversary in each gradient step.

verbs:
{"".join(f"  {f'{name} {verb.usage}':<37} {verb.summary}{chr(10)}" for name, verb in VERBS.items())}
Every key of the recipe is also a flag: --max-steps 60 --objective.lambda-adv 0.1
`uniapl train --help` lists the most important keys, `uniapl train --help-all` lists every key.

{EXIT_CODES}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code."""
    # Set before torch is loaded: OpenMP threads that spin while they wait made the steps of a small model
    # more than ten times slower on a busy machine (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code: Any = run(sys.argv[1:] if arguments is None else list(arguments))
    except SystemExit as end:
        code = end.code
    except BrokenPipeError:
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as `| head` does. Discard the remaining output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a verb and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from uniapl import __version__

        print(f"uniapl {__version__}")
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Escape characters that the terminal cannot show, because an encoding error would end the run.
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *rest = arguments
    try:
        if name not in VERBS:
            raise UsageError(_unknown_verb(name))
        function = name.replace("-", "_")
        if name in ("demo", "train", "check") and set(HELP_FLAGS) & set(rest):
            from uniapl.cli.help import recipe_help

            recipe_help(name, _with_home(rest))
            return 0
        with importing():
            module = import_module(f"uniapl.cli.{function}")
        getattr(module, function)(_with_home(rest))
        return 0
    except UniAPLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(VERBS[name].on_interrupt, file=sys.stderr)
        return 130


def _with_home(arguments: Sequence[str]) -> list[str]:
    """The arguments with `~` expanded, which shells do not do in `--output-dir=~/run` and in quotes."""
    try:
        return [expand_home(argument) for argument in arguments]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _unknown_verb(name: str) -> str:
    if name.endswith((".yaml", ".yml")):
        return f"unknown verb '{name:.80}'; did you mean 'uniapl train {name:.80}'?"
    other = OTHER_VERBS.get(name.replace("_", "-").lower())
    near = [other] if other else difflib.get_close_matches(name.replace("_", "-").lower(), VERBS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(VERBS)}"
    return f"unknown verb '{name:.80}'; {hint}"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Disable garbage collection, which takes a fifth of the time to import torch and transformers."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
