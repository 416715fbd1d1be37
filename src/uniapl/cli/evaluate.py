"""`uniapl evaluate`: score one model on suites, write the results and print them."""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import GenerationConfig

from uniapl.cli.help import short_parser, summary
from uniapl.cli.run_settings import TOOLS, RunSettings, settings_of_run
from uniapl.config import Config
from uniapl.config.resolve import load_recipe, resolve, stages_of
from uniapl.errors import UniAPLError, UsageError
from uniapl.evaluation.harness import find_tasks, run_lm_eval
from uniapl.evaluation.run import SuiteResult, evaluate_suite, paired
from uniapl.evaluation.suites import load_suites, parse_suite
from uniapl.files import json_line, write_text
from uniapl.models.generation import unused_generation_settings
from uniapl.models.loading import (
    ModelSource,
    check_vocabulary,
    load_model,
    load_stop_ids,
    load_tokenizer,
    put_on_device,
)
from uniapl.report.analysis import decimal
from uniapl.rollout.settings import SamplingSettings
from uniapl.training.build_sampler import SERVED, Tooling, evaluation_sampler

OVERRIDES = {
    "evaluation": (
        *("suites", "max_completion_length", "num_samples", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "stop_strings", "limit", "answer_after"),
    ),
    "data": ("prompt_format", "system_prompt", "chat_template_kwargs"),
    "model": ("chat_template_path", "stop_tokens"),
    "rollout": tuple(SERVED),
}
"""Keys of the recipe that have a flag of the same name."""
LISTS = {"suites": "NAME", "stop_strings": "STR", "stop_tokens": "STR"}
"""Flags with several values, and how `--help` names one."""
TRUNCATED = 0.1
"""The user is warned if more than this fraction of the completions reaches the token limit."""


def evaluate(arguments: Sequence[str]) -> dict[str, Any]:
    """`uniapl evaluate`; returns the content of results.json.

    Raises:
        UsageError: The model, a suite or an option is invalid; nothing was written.
        UniAPLError: No completion of a suite could be scored, or lm-eval failed; the other results were
            written.
    """
    options = _parse(arguments)
    if not options.json:
        # The width of a pipe is not defined.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        return _evaluate(options, console)
    # Reward functions and the libraries that they use may print.
    with contextlib.redirect_stdout(sys.stderr):
        results = _evaluate(options, Console(highlight=False, quiet=True))
    print(json.dumps(results, indent=1))
    return results


def _evaluate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    origin = settings_of_run(options.model)
    config = _config(options, origin)
    evaluation = config.evaluation
    source = ModelSource.resolve(config.model)
    tokenizer = load_tokenizer(source)
    if not _has_prompt_format(options, origin) and tokenizer.chat_template:
        config = config.model_copy(update={"data": config.data.model_copy(update={"prompt_format": "chat"})})
    against = _read_results(options.against, evaluation.suites) if options.against else None
    tasks = find_tasks(options.lm_eval_tasks, options.lm_eval_include_path) if options.lm_eval_tasks else None
    model = load_model(source)
    check_vocabulary(model, tokenizer)
    stop_ids = load_stop_ids(source, model.config, tokenizer)
    settings = SamplingSettings.of_evaluation(config, stop_ids, tokenizer)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tooling = Tooling.of(config, tokenizer, stop_ids)
    suites = load_suites(config, tokenizer, stop_ids=stop_ids, context_length=window)
    rollout, prompts = config.rollout, [example.prompt_ids for suite in suites for example in suite.examples]
    if rollout.sampler == "vllm":
        url, timeout = rollout.vllm_server_base_url, rollout.vllm_timeout
        console.print(f"using the vLLM server {url}; waiting for it for up to {timeout:g} s", markup=False)
    sampler, notes_on_sampler = evaluation_sampler(
        config, model, tooling, settings, prompts, max_batch_size=options.batch_size
    )
    _make_directory(options.output_dir, overwrite=options.overwrite)
    if rollout.sampler == "local" or tasks is not None:
        put_on_device(model)
    # lm-eval would otherwise apply the model's own repetition_penalty and so on.
    model.generation_config = GenerationConfig(eos_token_id=sorted(stop_ids))
    run = functools.partial(evaluate_suite, num_samples=evaluation.num_samples, seed=options.seed)
    found: dict[str, SuiteResult] = {}
    for suite in suites:
        console.print(f"{suite.name}: {len(suite.examples)} prompts", markup=False)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(suite.name, total=len(suite.examples))
            advance = functools.partial(progress.advance, bar)
            found[suite.name] = run(suite, sampler, tokenizer, advance=advance)
    results: dict[str, Any] = {
        "model": options.model,
        "versions": {name: version(name) for name in ("uniapl", "torch", "transformers")},
        "settings": _settings(config),
        "seed": options.seed,
        "suites": {name: result.summary for name, result in found.items()},
        "notes": [
            *notes_on_sampler,
            *_notes_on_run(config, options, origin),
            *unused_generation_settings(source.base, source.revision, [evaluation]),
        ],
    }
    if against is not None:
        results["minus"] = _differences(results, against)
    # Before lm-eval runs: the results of the suites are kept if it fails or is killed.
    _write(options.output_dir, results, found)
    if tasks is not None:
        sizes = {"batch_size": options.batch_size, "limit": evaluation.limit}
        results["lm_eval"] = run_lm_eval(model, tokenizer, options.lm_eval_tasks, tasks, **sizes)
        _write(options.output_dir, results, found)
    _show(results, options.output_dir, console)
    _refuse_unscored(results["suites"])
    return results


def _refuse_unscored(suites: Mapping[str, Any]) -> None:
    for name, result in suites.items():
        if result["unscored"] == 1:
            reason = "; ".join(result["notes"]) or "no reward function applies to its rows"
            raise UniAPLError(f"suite '{name}': no completion could be scored: {reason}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; an option that overrides a key of the recipe is named `section.key`."""
    parser = short_parser(
        "evaluate",
        "Score a model on IFEval, IFBench and your own files, with 95% confidence intervals over prompts "
        "(Wilson's or Student's t), next to the scores of an empty completion, the prompt and a fixed text.",
    )
    add = parser.add_argument
    add("model", help="directory or Hub id")
    for section, keys in OVERRIDES.items():
        fields = type(getattr(Config(), section)).model_fields
        for key in keys:
            default = (
                "that of the run, or chat if there is a template"
                if key == "prompt_format"
                else fields[key].default
            )
            text = SERVED.get(key) or f"{summary(fields[key])}{f' (default: {default})' if default else ''}"
            add(
                f"--{key.replace('_', '-')}",
                dest=f"{section}.{key}",
                metavar=LISTS.get(key, "VALUE"),
                nargs="+" if key in LISTS else None,
                type=_json if key == "chat_template_kwargs" else str,
                help=text.replace("%", "%%"),
            )
    help_ = "reward functions that score the rows of files"
    add("--rewards", dest="rewards.functions", nargs="+", metavar="NAME", help=help_)
    code: Any = {"dest": "rewards.allow_code_verifiers", "action": "store_const", "const": True}
    add("--allow-code-verifiers", help="run verifier functions from the data in a sandbox", **code)
    add("--recipe", help="recipe of data, rewards and evaluation; flags override it")
    add(
        "--lm-eval-tasks",
        default="",
        metavar="NAMES",
        help="other benchmarks to run with lm-eval: gsm8k,hellaswag",
    )
    add("--lm-eval-include-path", metavar="PATH", help="directory with further lm-eval tasks")
    help_ = "earlier output directory: report the differences with 95%% intervals"
    add("--against", type=Path, help=help_)
    add("--batch-size", type=int, default=64, help="completions sampled at a time (default: 64)")
    add(
        "--output-dir",
        type=Path,
        default=Path("runs/evaluation"),
        help="directory of the results (default: runs/evaluation)",
    )
    add("--overwrite", action="store_true", help="replace existing results")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add("--seed", type=int, default=0, help="seed of the sampling")
    add("--json", action="store_true", help="print the contents of results.json")
    options = parser.parse_args(arguments)
    options.lm_eval_tasks = options.lm_eval_tasks.replace(",", " ").split()
    if options.batch_size < 1:
        raise UsageError("--batch-size must be at least 1")
    return options


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error


def _config(options: argparse.Namespace, run: RunSettings | None) -> Config:
    """The recipe's data, rewards and evaluation, or the run's prompts, overridden by the flags."""
    resolved = resolve(load_recipe(options.recipe) if options.recipe else {})
    recipe = resolved.config
    include: Any = {
        **dict.fromkeys(("data", "rewards", "evaluation"), True),
        "rollout": {"decoding"},
        "model": {*OVERRIDES["model"]},
    }
    values = recipe.model_dump(include=include)
    last = stages_of(resolved)[-1].config
    values["rollout"] |= last.rollout.model_dump(include={"stop_strings", *TOOLS})
    values["rollout"]["vllm_mode"] = "server"
    if run is not None and not options.recipe:
        as_text = getattr(options, "data.prompt_format") == "text"
        values["data"] |= run.prompts | ({"system_prompt": None} if as_text else {})
        values["rollout"] |= {"stop_strings": run.stop_strings, **run.tools}
    for key, value in vars(options).items():
        section, _, name = key.partition(".")
        if name and value is not None:
            values[section][name] = value
    values["model"] |= {
        "model_name_or_path": options.model,
        "trust_remote_code": options.trust_remote_code,
    }
    config = resolve(values).config
    if not config.evaluation.suites and not options.lm_eval_tasks:
        remedy = "give --suites, a recipe with evaluation.suites, or --lm-eval-tasks"
        raise UsageError(f"nothing to evaluate: {remedy}")
    return config


def _has_prompt_format(options: argparse.Namespace, run: RunSettings | None) -> bool:
    """Whether a flag, the recipe or the run sets the prompt format, so that the tokenizer does not."""
    of_run = run is not None and "prompt_format" in run.prompts
    return bool(getattr(options, "data.prompt_format") or options.recipe or of_run)


def _notes_on_run(config: Config, options: argparse.Namespace, run: RunSettings | None) -> list[str]:
    """What was taken from the run that saved the model, and where a recipe differs from it."""
    if run is None:
        return []
    used = config.data.model_dump(include={*OVERRIDES["data"]})
    if not options.recipe:
        tools = config.rollout.model_dump(mode="json", include={"tools", "environment"})
        ours = used | {"stop_strings": _settings(config)["stop_strings"]} | tools
        shown = ", ".join(f"{key} {value}" for key, value in ours.items() if value)
        return [f"prompts, stop strings and tools as in {run.file}, unless a flag sets them: {shown}"]
    # Prompts of messages have the chat format; the recipe sets that of string prompts.
    chat_rows = {"prompt_format": "text"} if run.prompts.get("prompt_format") == "chat" else {}
    return [
        f"{key} is {used[key]}, as in {options.recipe}; the run that saved the model had {value}"
        for key, value in run.prompts.items()
        if used[key] not in (value, chat_rows.get(key)) and getattr(options, f"data.{key}") is None
    ]


def _settings(config: Config) -> dict[str, Any]:
    """How the completions are sampled, with the defaults that depend on other keys filled in."""
    found = config.evaluation.model_dump(mode="json") | config.data.model_dump(include={*OVERRIDES["data"]})
    found["sampler"] = config.rollout.sampler
    found["temperature"] = config.evaluation.sampling_temperature
    if found["stop_strings"] is None:
        found["stop_strings"] = config.rollout.model_dump(mode="json")["stop_strings"]
    if config.rollout.tools or config.rollout.environment:
        found |= config.rollout.model_dump(mode="json", include={*TOOLS})
    return found | config.model.model_dump(mode="json", include={*OVERRIDES["model"]})


def _read_results(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """The results.json of another evaluation, which must contain one of the wanted suites."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"model", "settings", "suites"} <= found.keys():
            raise ValueError("it is not a results.json of uniapl evaluate")
    except (OSError, ValueError) as error:
        raise UsageError(f"--against '{path}' cannot be read: {error}") from error
    if not {parse_suite(text)[0] for text in wanted} & found["suites"].keys():
        raise UsageError(f"--against '{path}': no suite in common (it has {', '.join(found['suites'])})")
    return found


def _differences(results: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = results["settings"], against["settings"]
    # Earlier versions had fewer settings.
    compared = ours.keys() & theirs.keys() - {"suites", "limit"}
    changed = [key for key in ours if key in compared and ours[key] != theirs[key]]
    return {
        "model": against["model"],
        "notes": [f"{key} is {ours[key]} here and was {theirs[key]} there" for key in changed],
        "suites": {
            name: paired(result, against["suites"][name])
            for name, result in results["suites"].items()
            if name in against["suites"]
        },
    }


def _make_directory(directory: Path, *, overwrite: bool) -> None:
    if any((directory / name).exists() for name in ("config.yaml", "checkpoints")):
        raise UsageError(f"--output-dir '{directory}' is the directory of a run: choose another")
    if (directory / "results.json").exists() and not overwrite:
        remedy = "replace them with --overwrite, or choose another --output-dir"
        raise UsageError(f"'{directory}' already contains results: {remedy}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create --output-dir '{directory}': {error}") from error


def _write(directory: Path, results: dict[str, Any], found: dict[str, SuiteResult]) -> None:
    lines = [json_line(one) for result in found.values() for one in result.completions]
    try:
        write_text(directory / "completions.jsonl", "".join(f"{line}\n" for line in lines))
        write_text(directory / "results.json", json.dumps(results, indent=1))
    except OSError as error:
        raise UniAPLError(f"cannot write to --output-dir '{directory}': {error}") from error


def _show(results: dict[str, Any], directory: Path, console: Console) -> None:
    minus = results.get("minus", {"suites": {}, "notes": []})
    for name, result in results["suites"].items():
        console.print(_table(name, result, minus))
        for note in notes(result, results["settings"]["max_completion_length"]):
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for note in minus["notes"]:
        console.print(f"note: the settings differ: {note}", markup=False, soft_wrap=True)
    for task, metrics in results.get("lm_eval", {}).items():
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "stderr" not in name)
        console.print(f"lm-eval {task}: {shown}", markup=False)
    console.print(f"results: {directory / 'results.json'}, {directory / 'completions.jsonl'}", markup=False)


def _table(name: str, result: dict[str, Any], minus: dict[str, Any]) -> Table:
    differences = minus["suites"].get(name, {})
    title = (
        f"{name}: {result['prompts']} prompts, completions per prompt: {result['samples']}, mean length: "
        f"{result['mean_length']:.0f} tokens, truncated: {_count(result, 'truncated')}"
    )
    compared = [f"difference from {minus['model']} (95% interval)"] if differences else []
    table = Table("score", "mean", "95% interval", *result["floors"], *compared, title=title)
    for score, value in result["scores"].items():
        row = [score, _number(value["mean"]), _range(value)]
        row += [_number(floor.get(score)) for floor in result["floors"].values()]
        if difference := differences.get(score):
            row.append(f"{_number(difference['mean'], '+')} {_range(difference, '+')}")
        table.add_row(*row)
    return table


def notes(result: dict[str, Any], limit: int) -> list[str]:
    """Warnings without which the scores of a suite could mislead.

    Args:
        limit: Maximum number of new tokens per completion.
    """
    found: list[str] = list(result["notes"])
    for reason, rows in result["left_out"].items():
        found.append(f"{len(rows)} prompts are left out: {reason}")
    if result["truncated"] > TRUNCATED:
        truncated = f"{_count(result, 'truncated')} completions were truncated at {limit} tokens"
        found.append(f"{truncated} and scored as they are: raise --max-completion-length to avoid this")
    if result["unscored"]:
        found.append(f"{_count(result, 'unscored')} completions could not be scored and are not counted")
    headline = result["headline"]
    mean = result["scores"][headline]["mean"]
    reached = [name for name, floor in result["floors"].items() if (floor[headline] or 0) >= (mean or 0)]
    if mean is not None and reached:
        found.append(f"{headline} is not above these completions without a model: {', '.join(reached)}")
    return found


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else decimal(value, sign=sign)


def _range(value: dict[str, Any], sign: str = "") -> str:
    low, high = value["low"], value["high"]
    return "" if low is None or high is None else f"[{decimal(low, sign=sign)}, {decimal(high, sign=sign)}]"


def _count(result: dict[str, Any], key: str) -> str:
    """A fraction of the completions as a count, which rounding cannot turn into none or all."""
    total = result["prompts"] * result["samples"]
    return f"{round(result[key] * total):,} of {total:,}"
