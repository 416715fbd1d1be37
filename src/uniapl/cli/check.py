"""`uniapl check`: validate a recipe, its data and its rewards without loading the model's weights."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from uniapl.cli.train import resolve_arguments
from uniapl.config import Config
from uniapl.config.resolve import Resolved, flatten, stages_of
from uniapl.data.streams import is_held_out
from uniapl.errors import UsageError
from uniapl.evaluation.contamination import WIDTH, overlap
from uniapl.models.loading import check_policy
from uniapl.tools.functions import Tool
from uniapl.training.checkpoint.disk import check_available
from uniapl.training.inputs import RunInputs, prompts_drawn, stream_examples
from uniapl.training.preflight import load as setup
from uniapl.training.preflight.checks import check_evaluation
from uniapl.training.preflight.epochs import with_max_steps
from uniapl.training.preflight.memory import estimate_memory
from uniapl.training.resume import read_start
from uniapl.types import Tokens, prompt_text


def check(arguments: Sequence[str]) -> None:
    """`uniapl check RECIPE.yaml [--key value ...] [--json]`.

    Raises:
        UsageError: Training would stop with the same error.
    """
    resolved = resolve_arguments("check", [a for a in arguments if a != "--json"])
    # Reward functions may print, and standard output must contain only the report.
    with contextlib.redirect_stdout(sys.stderr):
        report = check_run(resolved)
    if "--json" in arguments:
        print(json.dumps(report, indent=1, ensure_ascii=False, default=str))
    else:
        print_report(report)
    if report["error"] is not None:
        raise UsageError(report["error"])


def check_run(resolved: Resolved) -> dict[str, Any]:
    """Load and check everything except the weights, and return the report as plain values.

    Its "error" is that of the run directory or of the checkpoint, which says nothing about the recipe's data
    and rewards; None if there is none.

    Raises:
        UsageError: Training would stop with the same error.
    """
    stages = stages_of(resolved)
    check_evaluation(stages[-1].config, has_function=False)
    inputs = setup.load_inputs(resolved, stages)
    checked = check_policy(inputs.source, resolved.config.model)
    stages = [with_max_steps(stage, inputs.dataset, inputs.rewarder) for stage in stages]
    if not resolved.config.stages:
        (resolved,) = stages
    said: list[str] = []
    directory = Path(resolved.config.output_dir)
    problem: str | None = None
    try:
        check_available(directory)
        read_start(resolved, stages, inputs, said.append, directory)
    except UsageError as error:
        problem = str(error)
    examples = inputs.dataset.examples
    values = flatten(resolved.config)
    notes = [note for part in (resolved, *stages) for note in part.notes]
    start = [line.removeprefix("note: ") for line in said]
    skipped = [
        f"the vLLM server {stage.config.rollout.vllm_server_base_url} was not contacted"
        for stage in stages
        if stage.config.objective.uses_rollouts and stage.config.rollout.behind_server
    ]
    if not checked:
        skipped.append(f"the tensors of '{inputs.source.base}' were not checked: they are not downloaded yet")
    return {
        "values": {key: [values[key], source] for key, source in resolved.sources.items()},
        "notes": [*dict.fromkeys(notes), *inputs.notes, *dict.fromkeys(skipped), *start],
        "examples": len(examples),
        "with_demonstration": sum(e.demonstration_ids is not None for e in examples),
        "left_out": {reason: list(rows) for reason, rows in inputs.dataset.left_out.items()},
        "rewards": {
            reward.name: sum(reward.applies_to(e) for e in examples) for reward in inputs.rewarder.rewards
        },
        "reward_details": inputs.rewarder.details,
        "tools": {tool.name: _signature(tool) for tool in inputs.tools},
        "overlap": overlap_with_suites(inputs),
        "stages": [_stage_report(stage.config, inputs) for stage in stages],
        "memory": [_memory(stage.config, inputs) for stage in stages],
        "preview": _preview(inputs, pairs=any(s.config.objective.pairs_rejected for s in stages)),
        "error": problem,
    }


def _preview(inputs: RunInputs, *, pairs: bool) -> dict[str, Any]:
    """The first row with a demonstration, or the first preference pair, as the model receives it."""
    examples = inputs.dataset.examples
    wanted = (e for e in examples if (e.is_pair if pairs else e.demonstration_ids is not None))
    shown = next(wanted, examples[0])
    turns = shown.demonstrated_turns or (Tokens(shown.prompt_ids, ()),)
    *earlier, last = [_marked(turn, inputs.tokenizer) for turn in turns]
    return {
        "row": shown.row,
        "text": last,
        "earlier_turns": earlier,
        "rejected": inputs.tokenizer.decode(list(shown.rejected_ids or ())) if pairs else None,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report as text."""
    console = Console(highlight=False)
    table = Table("key", "value", "source", title="Values that differ from the defaults")
    for key, (value, source) in report["values"].items():
        if source != "default":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            table.add_row(key, escape(text), source)
    console.print(table)
    lines = [f"note: {note}" for note in report["notes"]]
    lines.append(f"data: {report['examples']} rows, {report['with_demonstration']} with a demonstration")
    for reason, rows in report["left_out"].items():
        lines.append(f"left out: {len(rows)} rows, {reason} ({_listed(rows, 10)})")
    for name, count in report["rewards"].items():
        lines.append(f"reward '{name}': applies to {count} rows")
    lines += [f"tool '{name}': {text}" for name, text in report["tools"].items()]
    for name, found in report["overlap"].items():
        pairs = [
            f"training row {ours} and suite row {theirs}" for ours, theirs in found["exact"] + found["ngram"]
        ]
        lines.append(
            f"{'warning: ' if pairs else ''}suite '{name}': {len(found['exact'])} of {report['examples']} "
            f"training prompts are also in the suite, {len(found['ngram'])} more share {WIDTH} consecutive "
            f"words with one of its prompts{f' ({_listed(pairs, 5)})' if pairs else ''}"
        )
    for number, (stage, memory) in enumerate(zip(report["stages"], report["memory"], strict=True), start=1):
        lines.append(f"stage {number}: {', '.join(f'{key} {value}' for key, value in stage.items())}")
        lines.append(f"stage {number}: {memory['text']}")
    preview = report["preview"]
    for line in lines:
        console.print(line, markup=False)
    turns = [*preview["earlier_turns"], preview["text"]]
    for number, text in enumerate(turns, start=1):
        turn = f", trained turn {number} of {len(turns)}," if len(turns) > 1 else ""
        title = f"row {preview['row']}{turn} as the model receives it (the tokens in the loss are in [[ ]]):"
        # Line breaks of the console would look like tokens of the row.
        console.print(f"{title}\n{text}", markup=False, soft_wrap=True)
    if preview["rejected"] is not None:
        console.print(f"its rejected completion:\n[[{preview['rejected']}]]", markup=False, soft_wrap=True)
    if report["error"] is None:
        console.print("ok")


def _marked(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row, with what enters the loss in [[ ]]."""
    written = tokens.is_written
    places = groupby(range(len(tokens.completion)), lambda place: written[place])
    text = str(tokenizer.decode(list(tokens.prompt)))
    for own, part in places:
        piece = str(tokenizer.decode([tokens.completion[place] for place in part]))
        text += f"[[{piece}]]" if own else piece
    return text if tokens.completion else f"{text}[[]]"


def _signature(tool: Tool) -> str:
    """The arguments and the description of a tool, as the chat template shows them."""
    function = tool.schema["function"]
    arguments = function["parameters"].get("properties", {})
    return f"({', '.join(arguments)}) {function['description']}"


def _listed(items: Sequence[Any], most: int) -> str:
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def overlap_with_suites(inputs: RunInputs) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """Suite -> pairs (training row, row of the suite) with equal prompts, and with a common n-gram."""
    ours = inputs.dataset.examples
    reports: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for suite in inputs.suites:
        found = overlap(*([prompt_text(e.prompt) for e in rows] for rows in (ours, suite.examples)))
        exact, ngram = (
            [(ours[i].row, suite.examples[j].row) for i, j in pairs.items()]
            for pairs in (found.exact, found.ngram)
        )
        reports[suite.name] = {"exact": exact, "ngram": [pair for pair in ngram if pair not in exact]}
    return reports


def _memory(config: Config, inputs: RunInputs) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = estimate_memory(config, inputs, device)
    except UsageError:
        raise
    except Exception as error:  # Code of a model may fail on tensors without data.
        return {"text": f"memory: no estimate, because the model fails on tensors without data ({error})"}
    return {**asdict(found), "peak": found.peak, "text": str(found)}


def _stage_report(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """The number of rows in a step of a stage, and of passes over the data."""
    prompts, demonstrations = stream_examples(config, inputs.dataset, inputs.rewarder)
    objective, batching, cold = config.objective, config.batching, config.cold_start_steps
    report: dict[str, Any] = {"method": config.method, "steps": config.max_steps}
    if cold:
        report["steps of the cold start"] = cold
    if objective.uses_rollouts:
        report["prompts"] = len(prompts)
        report["rollouts per step"] = batching.prompts_per_step * config.rollout.num_generations
        report["passes over the prompts"] = round(prompts_drawn(config) / len(prompts), 2)
    if objective.lambda_adv and objective.adversarial_placement == "multiply":
        name = objective.pass_reward or "the first one that applies"
        report["a completion passes if its reward"] = f"({name}) is at least {objective.pass_threshold:g}"
    paired = [e for e in prompts if e.demonstration_ids is not None]
    if objective.pairs_rollouts:
        report["prompts whose rollouts are paired with their demonstration"] = len(paired)
    if objective.pairs_rejected:
        report["preference pairs of the data"] = sum(e.is_pair for e in demonstrations)
    if objective.mu_controller == "gate":
        report["prompts with a demonstration"] = len(paired)
    elif config.learns_from_demonstrations:
        later = config.max_steps - cold if objective.learns_from_demonstrations else 0
        drawn = batching.demonstrations_per_step * later
        drawn += config.cold_start_demonstrations_per_step * cold
        report["demonstrations"] = len(demonstrations)
        report["demonstrations per step"] = batching.demonstrations_per_step
        if cold:
            report["demonstrations per step of the cold start"] = config.cold_start_demonstrations_per_step
        report["passes over the demonstrations"] = round(drawn / len(demonstrations), 2)
    if objective.lambda_adv > 0 and config.discriminator.kind == "bradley-terry":
        report["prompts for training the discriminator"] = sum(not is_held_out(e, config) for e in paired)
    return report
