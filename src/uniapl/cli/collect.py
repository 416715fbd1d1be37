"""The verb `collect`: prompts in, an expert's answers out, as a training file."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from uniapl.collect import filter as sieve
from uniapl.collect.cache import Answer, Cache, open_cache
from uniapl.collect.progress import Progress, shown
from uniapl.collect.rows import Demonstration, Question, Settings, demonstrations_of, read_questions
from uniapl.errors import UniAPLError, UsageError
from uniapl.files import write_text

RESERVED = ("model", "messages", "n", "stream", "seed", "temperature", "top_p", "max_tokens")
"""What --extra-body may not hold: other flags set it, or answers would come in another form."""


def collect(arguments: Sequence[str]) -> dict[str, Any]:
    """`uniapl collect`: what came of it, as --json prints it.

    Raises:
        UsageError: The prompts or an option cannot be used, or the endpoint refuses what it is asked.
        UniAPLError: Answers are missing, or none is of use; those that there are stay in the cache.
    """
    options = _parse(arguments)
    if not options.json:
        summary = _collect(options, Console(highlight=False))
    else:
        # Reward functions, and the libraries that they use, may print what they like.
        with contextlib.redirect_stdout(sys.stderr):
            summary = _collect(options, Console(highlight=False, quiet=True))
        print(json.dumps(summary, indent=1))
    if summary["failed"]:
        reason = next(iter(summary["failed"].values()))
        raise UniAPLError(
            f"no answer to rows {_listed(summary['failed'])} ({reason}): '{options.output}' is not written. "
            "The same command asks only for what is missing; take rows out that will never do"
        )
    if not summary["demonstrations"]:
        raise UniAPLError(f"no answer is of use: '{options.output}' is not written")
    return summary


def _collect(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    try:
        from uniapl.collect.client import Endpoint, checked_url
        from uniapl.collect.work import only_model
    except ImportError as error:
        raise UsageError(f"uniapl collect needs {error.name}: pip install 'uniapl[collect]'") from error

    questions = read_questions(options.prompts, options.limit)
    rewarder, notes = None, []
    if options.rewards:
        rewarder, notes = sieve.prepare(options.rewards, questions, allow_code=options.allow_code_verifiers)
    endpoint = Endpoint(
        url=checked_url(options.url),
        key_variable=options.api_key_variable,
        key=_key(options.api_key_variable),
        timeout=options.timeout,
        max_retries=options.max_retries,
    )
    path = Path(f"{options.output}.cache.jsonl")
    if options.output.exists() and not path.exists():
        raise UsageError(f"'{options.output}' is there already, without its cache: choose another --output")
    with open_cache(path) as cache:
        given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens")}
        settings = Settings(
            model=options.model or only_model(endpoint),
            sampling={name: value for name, value in given.items() if value is not None} | options.extra_body,
            seed=options.seed,
            system_prompt=options.system_prompt,
        )
        requests = {
            settings.key(question.prompt, sample): (question, sample)
            for question in questions
            for sample in range(options.num_samples)
        }
        progress, failures = _ask(requests, settings, endpoint, cache, options, console)
        usable, dropped = demonstrations_of(
            questions, settings, options.num_samples, cache.answers, keep_thinking=options.keep_thinking
        )
        notes += _other_models([cache.answers[key] for key in requests if key in cache.answers], settings)
        if rewarder is not None:
            usable, messages = sieve.score(usable, rewarder)
            usable, more = sieve.select(usable, min_reward=options.min_reward, best_of_n=options.best_of_n)
            notes, dropped = notes + messages, dropped | more
        if usable and not failures:
            _write(options.output, usable)
    summary: dict[str, Any] = {
        "output": str(options.output),
        "model": settings.model,
        "prompts": len(questions),
        "demonstrations": len(usable),
        "asked": progress.done,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "cost": progress.cost,
        "dropped": dropped,
        "failed": failures,
        "notes": notes,
    }
    _show(summary, progress, console)
    return summary


def _ask(
    requests: dict[str, tuple[Question, int]],
    settings: Settings,
    endpoint: Any,
    cache: Cache,
    options: argparse.Namespace,
    console: Console,
) -> tuple[Progress, dict[int, str]]:
    """Have every answer in the cache; what that took, and row -> why it has no answer."""
    from uniapl.collect.work import ask_all

    missing = {key: one for key, one in requests.items() if key not in cache.answers}
    if len(missing) < len(requests):
        there = len(requests) - len(missing)
        console.print(f"{there} of {len(requests)} answers are there already", markup=False)
    progress = Progress(total=len(missing), price_in=options.price_in, price_out=options.price_out)
    failures: dict[int, str] = {}
    with shown(progress, console) as count:

        def keep(key: str, answer: Answer) -> None:
            cache.keep(key, answer)
            count(answer)

        def failed(key: str, reason: str) -> None:
            failures[missing[key][0].row] = reason
            count(None)

        bodies = {key: settings.body(question.prompt, sample) for key, (question, sample) in missing.items()}
        if bodies:
            asyncio.run(ask_all(bodies, endpoint, concurrency=options.concurrency, keep=keep, failed=failed))
    return progress, dict(sorted(failures.items()))


def _other_models(answers: Sequence[Answer], settings: Settings) -> list[str]:
    others = [a.model for a in answers if a.model is not None and a.model != settings.model]
    if not others:
        return []
    named = ", ".join(sorted(set(others)))
    return [f"{len(others)} answers say that they are by another model than '{settings.model}': {named:.200}"]


def _write(path: Path, demonstrations: Iterable[Demonstration]) -> None:
    try:
        write_text(path, "".join(one.line() for one in demonstrations))
    except OSError as error:
        raise UniAPLError(f"'{path}' cannot be written: {error}") from error


def _show(summary: dict[str, Any], progress: Progress, console: Console) -> None:
    for reason, rows in summary["dropped"].items():
        remedy = "; raise --max-tokens" if reason == "cut short" else ""
        said = f"dropped: {len(rows)} answers, {reason}{remedy}: rows {_listed(rows)}"
        console.print(said, markup=False, soft_wrap=True)
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if progress.done:
        console.print(f"asked: {progress.line()}", markup=False, soft_wrap=True)
    if summary["demonstrations"] and not summary["failed"]:
        said = f"{summary['demonstrations']} demonstrations for {summary['prompts']} prompts"
        console.print(f"{summary['output']}: {said}, by {summary['model']}", markup=False, soft_wrap=True)


def _listed(rows: Iterable[int]) -> str:
    numbers = sorted(set(rows))
    return ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")


def _key(variable: str) -> str | None:
    """The key, if there is one; an odd one must not come up in an error of the HTTP library."""
    key = os.environ.get(variable, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError(f"the environment variable {variable} holds characters that no key has")
    return key or None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl collect",
        description="Answers of an expert behind an OpenAI-compatible chat endpoint (vLLM, SGLang, a "
        "vendor), as a training file. What was answered is kept in OUTPUT.cache.jsonl and never asked again.",
    )
    add = parser.add_argument
    add("prompts", help="rows with 'prompt' (text or messages), as for train; other columns are kept")
    add("-o", "--output", type=Path, required=True, help="the .jsonl file to write")
    add("--url", default="http://localhost:8000/v1", help="default: http://localhost:8000/v1")
    add("--model", help="default: the only one that the server has")
    add("--num-samples", type=int, default=1, metavar="N", help="answers per prompt (default: 1)")
    add("--temperature", type=float, help="default of this and the next two: the server's")
    add("--top-p", type=float, help="nucleus sampling")
    add("--max-tokens", type=int, help="of one answer; longer ones are cut short, and dropped")
    add("--seed", type=int, help="of each prompt's first answer; the second has the next one")
    help_ = """more of the request, as JSON: '{"chat_template_kwargs": {"enable_thinking": false}}'"""
    add("--extra-body", type=_extra_body, default={}, metavar="JSON", help=help_)
    add("--system-prompt", help="for prompts that have none")
    add("--keep-thinking", action="store_true", help="else <think>...</think> before an answer is cut")
    add("--rewards", nargs="+", metavar="NAME", help="functions that score answers: names, or FILE:FUNCTION")
    add("--min-reward", type=float, help="drop answers below it")
    add("--best-of-n", action="store_true", help="keep each prompt's best answer alone")
    add("--allow-code-verifiers", action="store_true", help="as rewards.allow_code_verifiers")
    add("--concurrency", type=int, default=32, help="requests at the same time (default: 32)")
    add("--timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    add("--max-retries", type=int, default=6, help="further tries of a failed request (default: 6)")
    help_ = "environment variable with the key, which is written nowhere (default: OPENAI_API_KEY)"
    add("--api-key-variable", default="OPENAI_API_KEY", metavar="NAME", help=help_)
    add("--price-in", type=float, help="of a million tokens of prompts: the cost is counted")
    add("--price-out", type=float, help="of a million tokens of answers")
    add("--limit", type=int, help="the first so many rows")
    add("--json", action="store_true", help="print what came of it as JSON, and nothing else")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.output.suffix != ".jsonl":
        raise UsageError(f"--output '{options.output}' must end in .jsonl")
    prompts = Path(options.prompts)
    if options.output.exists() and prompts.exists() and options.output.samefile(prompts):
        raise UsageError("--output is the file of the prompts: choose another")
    smallest = {"num_samples": 1, "concurrency": 1, "max_retries": 0, "max_tokens": 1, "limit": 1}
    for name, least in smallest.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    if not options.timeout > 0:
        raise UsageError("--timeout must be more than 0")
    if (options.min_reward is not None or options.best_of_n) and not options.rewards:
        raise UsageError("--min-reward and --best-of-n need --rewards")
    if options.num_samples > 1 and options.temperature == 0:
        raise UsageError("--num-samples with --temperature 0 would buy one answer several times: raise it")


def _extra_body(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    for name in RESERVED:
        if name in found:
            raise argparse.ArgumentTypeError(f"'{name}' has a flag of its own, or is not to be changed")
    return found
