"""The command line. Nothing heavy is imported before a verb needs it: `uniapl --help` answers at once."""

import contextlib
import functools
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

# Before pydantic is imported: an address of its own documentation says nothing of a recipe.
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")

from uniapl.errors import Interrupted, UniAPLError, UsageError

if TYPE_CHECKING:
    from uniapl.resolve import Resolved

HELP = """\
usage: uniapl VERB ...

One-stage post-training of language models: demonstrations, rewards and an adversary in each gradient step.

verbs:
  demo [--key value ...]                UniAPL on a small task that comes with the program, in minutes
  compare [--methods a,b] [--seeds 5]   methods side by side on that task, at equal budget, with intervals
  train RECIPE.yaml [--key value ...]   one run, or a pipeline of stages (--quiet; --json for scripts)
  check RECIPE.yaml [--key value ...]   everything that can be known before training (--json for scripts)
  evaluate MODEL --suites ifeval ...    scores on IFEval, IFBench, files of yours, beside their floors
  report RUN ... [-o FILE]              a page on a run, or on several: curves, lengths, every sampled answer
  chat MODEL                            what a model answers, line by line
  export RUN -o DIRECTORY               a run's or a checkpoint's model, an adapter merged into its base
  compose PROMPTS -o TRAIN.jsonl        prompts times checkable instructions: a training set
  collect PROMPTS -o TRAIN.jsonl        an expert's answers from an OpenAI-compatible endpoint
  pretrain-discriminator DATA ...       a frozen discriminator (POLAR's way) from what several policies write

Every key of the recipe is a flag: --max-steps 60 --objective.lambda-adv 0.1
`uniapl train RECIPE.yaml --help` lists them all with their values.

exit codes: 0 ok, 1 failed, 2 usage, configuration or data, 3 stopped by a health rule, 130 or 143 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code."""
    # Before torch is loaded: OpenMP threads that wait by spinning take the processor from whatever else runs,
    # which made steps of a small model more than ten times slower on a busy machine (docs/log.md).
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
        # Whoever read has had enough (`| head`); what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a verb; the exit code."""
    verbs = {
        "demo": demo,
        "compare": compare,
        "train": train,
        "check": check,
        "evaluate": evaluate,
        "report": report,
        "chat": chat,
        "export": export,
        "compose": compose,
        "collect": collect,
        "pretrain-discriminator": pretrain_discriminator,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal cannot show is written as an escape: it must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if arguments[0] not in verbs:
            raise UsageError(f"unknown verb '{arguments[0]}': choose one of {', '.join(verbs)}")
        return verbs[arguments[0]](arguments[1:])
    except UniAPLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted at once: what came after the last checkpoint is lost", file=sys.stderr)
        return 130


def demo(arguments: list[str]) -> int:
    """`uniapl demo [--key value ...]`."""
    from transformers.utils import logging

    from uniapl.embedded.demo import demo as run_demo

    logging.disable_progress_bar()
    run_demo(arguments)
    return 0


def compare(arguments: list[str]) -> int:
    """`uniapl compare [--output-dir ...] [--methods a,b] [--seeds 5] [--jobs 2] [--parts table,fronts]`."""
    from uniapl.compare.command import compare as run_compare

    try:
        run_compare(arguments)
    except KeyboardInterrupt:
        said = "interrupted; finished cells are kept, the same command goes on with the others"
        raise Interrupted(said, signal.SIGINT) from None
    return 0


def train(arguments: list[str]) -> int:
    """`uniapl train RECIPE.yaml [--key value ...] [--quiet | --json]`."""
    shows = [show for show in ("quiet", "json") if f"--{show}" in arguments]
    if len(shows) > 1:
        raise UsageError("--quiet and --json: choose one")
    arguments = [a for a in arguments if a not in ("--quiet", "--json")]
    resolved = _resolve("train", arguments)
    with _importing():
        from transformers.utils import logging

        from uniapl.train.api import train_resolved

    # Bars for every file that is loaded or saved would tear the run's own display.
    logging.disable_progress_bar()
    if shows != ["json"]:
        train_resolved(resolved, show="quiet" if shows else "text")
        return 0
    # Reward functions may print what they like; what a script reads is the metrics alone.
    metrics = functools.partial(print, file=sys.stdout, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        train_resolved(resolved, show=metrics)
    return 0


def chat(arguments: list[str]) -> int:
    """`uniapl chat MODEL [--system ...] [--temperature 0.7]`."""
    from transformers.utils import logging

    from uniapl.chat import chat as run_chat

    logging.disable_progress_bar()
    run_chat(arguments)
    return 0


def export(arguments: list[str]) -> int:
    """`uniapl export RUN_OR_CHECKPOINT -o DIRECTORY`."""
    from transformers.utils import logging

    from uniapl.train.export import export as run_export

    logging.disable_progress_bar()
    run_export(arguments)
    return 0


def check(arguments: list[str]) -> int:
    """`uniapl check RECIPE.yaml [--key value ...] [--json]`."""
    as_json = "--json" in arguments
    resolved = _resolve("check", [a for a in arguments if a != "--json"])
    with _importing():
        from uniapl.train.check import check_run, print_report

    # Reward functions may print what they like; what a script reads is the report alone.
    with contextlib.redirect_stdout(sys.stderr):
        report = check_run(resolved)
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False, default=str))
    else:
        print_report(report)
    return 0


def evaluate(arguments: list[str]) -> int:
    """`uniapl evaluate MODEL --suites ifeval held_out.jsonl [--rewards ...] [--against DIR] [--json]`."""
    from transformers.utils import logging

    from uniapl.evaluation.command import evaluate as run_evaluation

    logging.disable_progress_bar()
    try:
        run_evaluation(arguments)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written", signal.SIGINT) from None
    return 0


def report(arguments: list[str]) -> int:
    """`uniapl report RUN ... [-o FILE] [--model-analysis] [--figures DIR]`."""
    from uniapl.report.command import report as run_report

    run_report(arguments)
    return 0


def compose(arguments: list[str]) -> int:
    """`uniapl compose PROMPTS -o TRAIN.jsonl [--per-prompt 2] [--overlap drop]`."""
    from uniapl.compose.command import compose as run_composing

    run_composing(arguments)
    return 0


def collect(arguments: list[str]) -> int:
    """`uniapl collect PROMPTS -o TRAIN.jsonl [--url ...] [--model ...] [--num-samples 4] [--json]`."""
    from uniapl.collect.command import collect as run_collecting

    try:
        run_collecting(arguments)
    except KeyboardInterrupt:
        said = "interrupted; answers so far are kept, the same command goes on with the others"
        raise Interrupted(said, signal.SIGINT) from None
    return 0


def pretrain_discriminator(arguments: list[str]) -> int:
    """`uniapl pretrain-discriminator DATA --policies DIR DIR --model-name-or-path DIR [--output-dir ...]`."""
    from transformers.utils import logging

    from uniapl.train.pretrain_discriminator import pretrain_discriminator as run_pretraining

    logging.disable_progress_bar()
    run_pretraining(arguments)
    return 0


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Without looking for garbage: what torch and transformers make stays, and looking took a fifth."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _resolve(verb: str, arguments: list[str]) -> "Resolved":
    from uniapl.resolve import load_recipe, resolve

    recipe: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        recipe = load_recipe(arguments.pop(0))
    elif not any(a in ("-h", "--help") for a in arguments):
        raise UsageError(f"uniapl {verb} needs a recipe: uniapl {verb} RECIPE.yaml [--key value ...]")
    return resolve(recipe, arguments)


if __name__ == "__main__":
    main()
