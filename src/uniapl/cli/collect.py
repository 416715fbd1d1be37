"""`uniapl collect`: write a training file with demonstrations from an endpoint."""

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

from uniapl.cli.help import short_parser
from uniapl.collect.cache import Cache, Reply, open_cache
from uniapl.collect.filter import load_rewarder, score, select
from uniapl.collect.progress import Progress, counting
from uniapl.collect.rows import PromptRow, Settings, demonstrations_of, notes_on, read_prompts
from uniapl.errors import UniAPLError, UsageError
from uniapl.files import write_text

RESERVED = ("model", "messages", "n", "stream", "seed", "temperature", "top_p", "max_tokens")
"""Keys that --extra-body must not set: they have flags, or would change the form of the response."""


def collect(arguments: Sequence[str]) -> dict[str, Any]:
    """`uniapl collect`: the summary that --json prints.

    Raises:
        UsageError: The prompts or an option cannot be used, or the endpoint rejects the requests.
        UniAPLError: Replies are missing, or none is usable; the replies received stay in the cache.
    """
    options = _parse(arguments)
    if not options.json:
        summary = _collect(options, Console(highlight=False))
    else:
        # Reward functions and their libraries may print, and standard output must contain only the summary.
        with contextlib.redirect_stdout(sys.stderr):
            summary = _collect(options, Console(highlight=False, quiet=True))
        print(json.dumps(summary, indent=1))
    if summary["failed"]:
        reason = next(iter(summary["failed"].values()))
        raise UniAPLError(
            f"no completion for rows {_listed(summary['failed'])} ({reason}): "
            f"'{options.output}' was not written. The same command requests only what is missing; "
            "remove rows that always fail"
        )
    if not summary["demonstrations"]:
        raise UniAPLError(f"no completion is usable: '{options.output}' was not written")
    return summary


def _collect(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    try:
        from uniapl.collect.client import Endpoint, only_model
    except ImportError as error:
        raise UsageError(f"uniapl collect needs {error.name}: pip install 'uniapl[collect]'") from error

    rows = read_prompts(options.prompts, options.limit)
    rewarder, notes = None, []
    if options.rewards:
        rewarder, notes = load_rewarder(options.rewards, rows, allow_code=options.allow_code_verifiers)
    endpoint = Endpoint(
        url=options.url,
        key_variable=options.api_key_variable,
        key=_key(options.api_key_variable),
        timeout=options.timeout,
        max_retries=options.max_retries,
    )
    path = Path(f"{options.output}.cache.jsonl")
    if options.output.exists() and not path.exists():
        raise UsageError(f"'{options.output}' exists without its cache '{path}': choose another --output")
    with open_cache(path) as cache:
        settings = _settings(options, options.model or only_model(endpoint))
        requests = {
            settings.key(row.prompt, sample): (row, sample)
            for row in rows
            for sample in range(options.num_samples)
        }
        progress, failures = _request(requests, settings, endpoint, cache, options, console)
        thinking = options.thinking or settings.asks_for_thinking
        form = {"thinking": thinking, "keep_thinking": options.keep_thinking}
        usable, dropped = demonstrations_of(rows, settings, options.num_samples, cache.replies, **form)
        replies = [cache.replies[key] for key in requests if key in cache.replies]
        notes += _other_models(replies, settings.model) + notes_on(replies, thinking=thinking)
        if rewarder is not None:
            usable, errors = score(usable, rewarder)
            usable, worse = select(usable, min_reward=options.min_reward, best_of_n=options.best_of_n)
            notes, dropped = notes + errors, dropped | worse
        if usable and not failures:
            try:
                write_text(options.output, "".join(one.line() for one in usable))
            except OSError as error:
                raise UniAPLError(f"cannot write '{options.output}': {error}") from error
    summary: dict[str, Any] = {
        "output": str(options.output),
        "model": settings.model,
        "prompts": len(rows),
        "demonstrations": len(usable),
        "asked": progress.done,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "cost": progress.cost,
        "dropped": dropped,
        "failed": failures,
        "notes": notes,
    }
    for line in _lines(summary, progress):
        console.print(line, markup=False, soft_wrap=True)
    return summary


def _settings(options: argparse.Namespace, model: str) -> Settings:
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens")}
    sampling = {name: value for name, value in given.items() if value is not None} | options.extra_body
    return Settings(model=model, sampling=sampling, seed=options.seed, system_prompt=options.system_prompt)


def _request(
    requests: dict[str, tuple[PromptRow, int]],
    settings: Settings,
    endpoint: Any,
    cache: Cache,
    options: argparse.Namespace,
    console: Console,
) -> tuple[Progress, dict[int, str]]:
    """Send the requests without a cached reply; return their counts, and the reasons of failures by row."""
    from uniapl.collect.client import request_all

    missing = {key: request for key, request in requests.items() if key not in cache.replies}
    if len(missing) < len(requests):
        console.print(f"{len(requests) - len(missing)} of {len(requests)} replies are cached", markup=False)
    progress = Progress(total=len(missing), price_in=options.price_in, price_out=options.price_out)
    failures: dict[int, str] = {}
    with counting(progress, console) as count:

        def received(key: str, reply: Reply) -> None:
            cache.add(key, reply)
            count(reply)

        def failed(key: str, reason: str) -> None:
            failures[missing[key][0].number] = reason
            count(None)

        bodies = {key: settings.body(row.prompt, sample) for key, (row, sample) in missing.items()}
        if bodies:
            sending = request_all(
                bodies, endpoint, concurrency=options.concurrency, received=received, failed=failed
            )
            asyncio.run(sending)
    return progress, dict(sorted(failures.items()))


def _other_models(replies: Sequence[Reply], model: str) -> list[str]:
    others = [reply.model for reply in replies if reply.model not in (None, model)]
    if not others:
        return []
    return [f"{len(others)} replies name a model other than '{model}': {', '.join(sorted(set(others))):.200}"]


def _lines(summary: dict[str, Any], progress: Progress) -> list[str]:
    """The summary for the console."""
    lines = [
        f"dropped: {len(rows)} completions, {reason}{'; raise --max-tokens' * (reason == 'truncated')}: "
        f"rows {_listed(rows)}"
        for reason, rows in summary["dropped"].items()
    ]
    lines += [f"note: {note}" for note in summary["notes"]]
    if progress.done:
        lines.append(f"requested: {progress.line()}")
    if summary["demonstrations"] and not summary["failed"]:
        counts = f"{summary['demonstrations']} demonstrations for {summary['prompts']} prompts"
        lines.append(f"{summary['output']}: {counts}, model {summary['model']}")
    return lines


def _listed(rows: Iterable[int]) -> str:
    numbers = sorted(set(rows))
    return ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")


def _key(variable: str) -> str | None:
    """The API key, if one is set. An invalid one would be printed in an error of the HTTP library."""
    key = os.environ.get(variable, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError(f"the environment variable {variable} contains characters that no API key has")
    return key or None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = short_parser(
        "collect",
        "Generate demonstrations with an OpenAI-compatible chat endpoint (vLLM, SGLang, a vendor). "
        "Replies are cached in OUTPUT.cache.jsonl and never requested again.",
    )
    add = parser.add_argument
    add("prompts", help="rows with 'prompt' (text or messages), as for train; other columns are kept")
    add("-o", "--output", type=Path, required=True, help="the .jsonl file to write")
    add("--url", default="http://localhost:8000/v1", help="base URL of the endpoint (default: %(default)s)")
    add("--model", help="model name (default: the server's only model)")
    add("--num-samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    add("--temperature", type=float, help="sampling temperature (default: the server's)")
    add("--top-p", type=float, help="nucleus sampling (default: the server's)")
    add("--max-tokens", type=int, help="maximum tokens of a completion; truncated completions are dropped")
    add("--seed", type=int, help="seed of each prompt's first sample; sample k has this seed plus k")
    help_ = """more keys of the request, as JSON: '{"chat_template_kwargs": {"enable_thinking": false}}'"""
    add("--extra-body", type=_extra_body, default={}, metavar="JSON", help=help_)
    add("--system-prompt", metavar="TEXT", help="system prompt for prompts that have none")
    add("--thinking", action="store_true", help="remove the text before </think> even if no <think> opens it")
    add("--keep-thinking", action="store_true", help="keep <think>...</think> (default: remove it)")
    add(
        "--rewards",
        nargs="+",
        metavar="NAME",
        help="reward functions that score completions: names, or FILE:FUNCTION",
    )
    add("--min-reward", type=float, help="drop completions with a lower reward")
    add("--best-of-n", action="store_true", help="keep only the best completion of each prompt")
    add("--allow-code-verifiers", action="store_true", help="same as rewards.allow_code_verifiers")
    add("--concurrency", type=int, default=32, help="simultaneous requests (default: 32)")
    add("--timeout", type=float, default=120.0, help="timeout of one request, in seconds (default: 120)")
    add("--max-retries", type=int, default=6, help="retries of a failed request (default: 6)")
    help_ = "environment variable with the API key, which is never written to a file (default: %(default)s)"
    add("--api-key-variable", default="OPENAI_API_KEY", metavar="NAME", help=help_)
    add("--price-in", type=float, help="price of a million prompt tokens, to report the cost")
    add("--price-out", type=float, help="price of a million completion tokens")
    add("--limit", type=int, help="use only the first LIMIT rows")
    add("--json", action="store_true", help="print only a summary, as JSON")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.output.suffix != ".jsonl":
        raise UsageError(f"--output '{options.output}' must end in .jsonl")
    prompts = Path(options.prompts)
    if options.output.exists() and prompts.exists() and options.output.samefile(prompts):
        raise UsageError("--output is the file of the prompts: choose another file")
    minimum = {"num_samples": 1, "concurrency": 1, "max_retries": 0, "max_tokens": 1, "limit": 1}
    for name, least in minimum.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    if not options.timeout > 0:
        raise UsageError("--timeout must be more than 0")
    if (options.min_reward is not None or options.best_of_n) and not options.rewards:
        raise UsageError("--min-reward and --best-of-n need --rewards")
    if options.num_samples > 1 and options.temperature == 0:
        raise UsageError("--num-samples with --temperature 0 gives equal completions: raise --temperature")


def _extra_body(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    for name in RESERVED:
        if name in found:
            raise argparse.ArgumentTypeError(f"'{name}' has its own flag or must not be changed")
    return found
