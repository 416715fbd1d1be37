"""The verb `evaluate`: parse, load one model, run its suites, and say what came out."""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from uniapl.config import Config, ModelConfig
from uniapl.config.resolve import load_recipe, resolve
from uniapl.errors import UniAPLError, UsageError
from uniapl.evaluation.harness import find_tasks, run_lm_eval
from uniapl.evaluation.run import SuiteResult, evaluate_suite, paired
from uniapl.evaluation.suites import BENCHMARKS, Suite, load_suites, parse_suite
from uniapl.files import write_text
from uniapl.models.loading import check_vocabulary, load_model, load_stop_ids, load_tokenizer
from uniapl.rollout.local import LocalSampler

TRUNCATED = 0.1
"""Share of answers cut at the token limit from which on the user is told."""


def evaluate(arguments: Sequence[str]) -> dict[str, Any]:
    """`uniapl evaluate`: what results.json holds.

    Raises:
        UsageError: The model, a suite or an option cannot be used; nothing was written.
        UniAPLError: No answer of a suite could be scored, or lm-eval failed; what there is was written.
    """
    options = _parse(arguments)
    if not options.json:
        # What is piped somewhere has no width.
        width = None if sys.stdout.isatty() else 160
        return _evaluate(options, Console(highlight=False, width=width))
    # Reward functions, and the libraries that they use, may print what they like.
    with contextlib.redirect_stdout(sys.stderr):
        summary = _evaluate(options, Console(highlight=False, quiet=True))
    print(json.dumps(summary, indent=1))
    return summary


def _evaluate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    config = _config(options)
    evaluation = config.evaluation
    tokenizer = load_tokenizer(config.model)
    if not (options.prompt_format or options.recipe) and tokenizer.chat_template:
        config = config.model_copy(update={"data": config.data.model_copy(update={"prompt_format": "chat"})})
    settings = {**evaluation.model_dump(mode="json"), "prompt_format": config.data.prompt_format}
    settings["temperature"] = evaluation.sampling_temperature
    against = _read_results(options.against, evaluation.suites) if options.against else None
    tasks = find_tasks(options.lm_eval_tasks, options.lm_eval_include_path) if options.lm_eval_tasks else None
    model = load_model(config.model)
    check_vocabulary(model, tokenizer)
    stop_ids = load_stop_ids(config.model, model.config, tokenizer)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    suites = load_suites(config, tokenizer, stop_ids=stop_ids, context_length=window)
    _make_directory(options.output_dir, overwrite=options.overwrite)
    _put_on_device(model)
    assert isinstance(tokenizer.pad_token_id, int)
    sampler = LocalSampler(
        model=model,
        stop_ids=stop_ids,
        pad_id=tokenizer.pad_token_id,
        max_completion_length=evaluation.max_completion_length,
        temperature=evaluation.sampling_temperature,
        max_batch_size=options.batch_size,
        decoding=config.rollout.decoding,
    )
    found = {
        suite.name: _answer(suite, sampler, tokenizer, evaluation.num_samples, options.seed, console)
        for suite in suites
    }
    summary: dict[str, Any] = {
        "model": options.model,
        "versions": {name: version(name) for name in ("uniapl", "torch", "transformers")},
        "settings": settings,
        "seed": options.seed,
        "suites": {name: result.summary for name, result in found.items()},
    }
    if against is not None:
        summary["minus"] = _differences(summary, against)
    # Before lm-eval, which may fail in its own ways.
    _write(options.output_dir, summary, found)
    if tasks is not None:
        summary["lm_eval"] = run_lm_eval(
            model,
            tokenizer,
            options.lm_eval_tasks,
            tasks,
            batch_size=options.batch_size,
            limit=evaluation.limit,
        )
        _write(options.output_dir, summary, found)
    _show(summary, suites, options.output_dir, console)
    _fail_if_nothing_is_known(summary)
    return summary


def _answer(
    suite: Suite, sampler: LocalSampler, tokenizer: Any, num_samples: int, seed: int, console: Console
) -> SuiteResult:
    console.print(f"{suite.name}: {len(suite.examples)} prompts", markup=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(suite.name, total=len(suite.examples))
        advance = functools.partial(progress.advance, bar)
        return evaluate_suite(suite, sampler, tokenizer, num_samples=num_samples, seed=seed, advance=advance)


def _fail_if_nothing_is_known(summary: dict[str, Any]) -> None:
    for name, result in summary["suites"].items():
        if result["unscored"] == 1:
            said = "; ".join(result["notes"]) or "no reward function applies to its rows"
            raise UniAPLError(f"suite '{name}': no answer could be scored: {said}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl evaluate",
        description="Scores of a model on IFEval, IFBench and files of your own, beside what an empty "
        "answer, the prompt itself and one constant text score; with intervals over prompts.",
    )
    add = parser.add_argument
    add("model", help="directory or Hub id")
    add(
        "--suites",
        nargs="+",
        metavar="SUITE",
        help=f"{', '.join(BENCHMARKS)} (from the Hub, or NAME=PATH), scored as benchmarks; or a file of rows",
    )
    add("--rewards", nargs="+", metavar="NAME", help="functions that score a file's answers")
    add("--recipe", help="takes data, rewards and evaluation from it; flags override it")
    add("--max-completion-length", type=int, help="new tokens per answer (default: 1280)")
    add("--num-samples", type=int, help="answers per prompt, k of pass@k (default: 1)")
    add("--temperature", type=float, help="0 is greedy (default: 0, and 1 with several samples)")
    add("--limit", type=int, help="the first so many prompts of each suite")
    add("--answer-after", help="judge what stands behind this mark, e.g. '</think>' (benchmarks)")
    add("--prompt-format", choices=("text", "chat"), help="default: chat if there is a chat template")
    add("--system-prompt", help="for chat prompts that have none")
    add("--chat-template-kwargs", type=_json_object, help="""as JSON, e.g. '{"enable_thinking": false}'""")
    add("--allow-code-verifiers", action="store_true", help="as rewards.allow_code_verifiers")
    add("--lm-eval-tasks", type=_words, default=[], help="further benchmarks, by lm-eval: gsm8k,hellaswag")
    add("--lm-eval-include-path", help="a folder with further tasks for lm-eval")
    add("--against", type=Path, help="an earlier output directory: differences, with intervals")
    add("--batch-size", type=int, default=64, help="rows decoded at the same time (default: 64)")
    add("--output-dir", type=Path, default=Path("runs/evaluation"), help="default: runs/evaluation")
    add("--overwrite", action="store_true", help="replace results that are already there")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--json", action="store_true", help="print results.json")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise UsageError("--batch-size must be at least 1")
    return options


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _config(options: argparse.Namespace) -> Config:
    """The recipe's data, rewards and evaluation, or the default ones, with the flags over them."""
    given = resolve(load_recipe(options.recipe) if options.recipe else {}).config
    values: dict[str, dict[str, Any]] = {
        "data": given.data.model_dump(),
        "rewards": given.rewards.model_dump(),
        "evaluation": given.evaluation.model_dump(),
        "rollout": {"decoding": given.rollout.decoding},
    }
    evaluation = ("suites", "max_completion_length", "num_samples", "temperature", "limit", "answer_after")
    data = ("prompt_format", "system_prompt", "chat_template_kwargs")
    for section, keys in (("evaluation", evaluation), ("data", data)):
        flags = {key: getattr(options, key) for key in keys}
        values[section] |= {key: value for key, value in flags.items() if value is not None}
    if options.rewards:
        values["rewards"]["functions"] = options.rewards
    if options.allow_code_verifiers:
        values["rewards"]["allow_code_verifiers"] = True
    config = resolve(dict(values)).config
    if not config.evaluation.suites and not options.lm_eval_tasks:
        remedy = "give --suites, a recipe with evaluation.suites, or --lm-eval-tasks"
        raise UsageError(f"nothing to evaluate: {remedy}")
    model = ModelConfig(model_name_or_path=options.model, trust_remote_code=options.trust_remote_code)
    return config.model_copy(update={"model": model})


def _put_on_device(model: Any) -> None:
    """The machine's accelerator, in bf16 where it has that; Apple's GPUs lack the sampler's fp64."""
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "mps":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        model.to(device, dtype=torch.bfloat16 if bf16 else torch.float32)


def _read_results(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Another evaluation's results.json, if it can be compared with the suites that are wanted."""
    file = path / "results.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"model", "settings", "suites"} <= found.keys():
            raise ValueError("it is no results.json of uniapl evaluate")
    except (OSError, ValueError) as error:
        raise UsageError(f"--against '{path}' cannot be read: {error}") from error
    if not {parse_suite(text)[0] for text in wanted} & found["suites"].keys():
        raise UsageError(f"--against '{path}': no suite in common (it has {', '.join(found['suites'])})")
    return found


def _differences(summary: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = summary["settings"], against["settings"]
    changed = [key for key in ours if key not in ("suites", "limit") and ours[key] != theirs.get(key)]
    return {
        "model": against["model"],
        "notes": [f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in changed],
        "suites": {
            name: paired(result, against["suites"][name])
            for name, result in summary["suites"].items()
            if name in against["suites"]
        },
    }


def _make_directory(directory: Path, *, overwrite: bool) -> None:
    if any((directory / name).exists() for name in ("config.yaml", "checkpoints")):
        raise UsageError(f"--output-dir '{directory}' is the directory of a run: choose another")
    if (directory / "results.json").exists() and not overwrite:
        remedy = "replace them by --overwrite, or choose another --output-dir"
        raise UsageError(f"'{directory}' already holds results: {remedy}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir '{directory}' cannot be made: {error}") from error


def _write(directory: Path, summary: dict[str, Any], found: dict[str, SuiteResult]) -> None:
    lines = [json.dumps(one) for result in found.values() for one in result.completions]
    try:
        write_text(directory / "completions.jsonl", "".join(f"{line}\n" for line in lines))
        write_text(directory / "results.json", json.dumps(summary, indent=1))
    except OSError as error:
        raise UniAPLError(f"--output-dir '{directory}' cannot be written: {error}") from error


def _show(summary: dict[str, Any], suites: Sequence[Suite], directory: Path, console: Console) -> None:
    for suite in suites:
        console.print(_table(suite, summary))
        for note in notes(summary["suites"][suite.name], summary["settings"]["max_completion_length"]):
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    for note in summary.get("minus", {}).get("notes", []):
        console.print(f"note: not alike: {note}", markup=False, soft_wrap=True)
    for task, metrics in summary.get("lm_eval", {}).items():
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "stderr" not in name)
        console.print(f"lm-eval {task}: {shown}", markup=False)
    console.print(f"{directory / 'results.json'}  {directory / 'completions.jsonl'}", markup=False)


def _table(suite: Suite, summary: dict[str, Any]) -> Table:
    result = summary["suites"][suite.name]
    minus = summary.get("minus", {"suites": {}})
    differences = minus["suites"].get(suite.name, {})
    title = (
        f"{suite.name}: {result['prompts']} prompts, {result['samples']} answers each, "
        f"{result['mean_length']:.0f} tokens on average, {result['truncated']:.1%} cut short"
    )
    headers = ["score", "mean", "95 %", *result["floors"]]
    table = Table(*headers, *([f"minus {minus['model']}"] if differences else []), title=title)
    for name, value in result["scores"].items():
        row = [name, _number(value["mean"]), _range(value)]
        row += [_number(floor.get(name)) for floor in result["floors"].values()]
        if differences:
            difference = differences.get(name)
            row.append(f"{_number(difference['mean'], '+')} {_range(difference, '+')}" if difference else "")
        table.add_row(*row)
    return table


def notes(result: dict[str, Any], limit: int) -> list[str]:
    """What a reader of the scores must know not to be misled by them."""
    said: list[str] = list(result["notes"])
    for reason, rows in result["left_out"].items():
        said.append(f"{len(rows)} prompts are left out, {reason}")
    if result["truncated"] > TRUNCATED:
        share = f"{result['truncated']:.0%} of the answers were cut at {limit} tokens"
        said.append(f"{share} and are judged as they stand: raise --max-completion-length")
    if result["unscored"]:
        said.append(f"{result['unscored']:.1%} of the answers could not be scored and count nowhere")
    headline = result["headline"]
    mean = result["scores"][headline]["mean"]
    reached = [
        name
        for name, floor in result["floors"].items()
        if mean is not None and (floor[headline] or 0) >= mean
    ]
    if reached:
        said.append(f"{headline} is no better than answers that took no model: {', '.join(reached)}")
    return said


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _range(value: dict[str, Any], sign: str = "") -> str:
    return "" if value["low"] is None else f"[{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
