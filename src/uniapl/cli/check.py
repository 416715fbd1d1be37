"""`uniapl check`: everything that can be known before training, without loading the model's weights."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uniapl.cli.train import resolve_arguments
from uniapl.config import Config
from uniapl.config.resolve import Resolved, flatten, stages_of
from uniapl.data.streams import is_held_out
from uniapl.errors import UsageError
from uniapl.evaluation.contamination import WIDTH, overlap
from uniapl.training.inputs import RunInputs, streams
from uniapl.training.preflight import load as setup
from uniapl.training.preflight.memory import estimate_memory
from uniapl.types import Example, prompt_text


def check(arguments: Sequence[str]) -> None:
    """`uniapl check RECIPE.yaml [--key value ...] [--json]`.

    Raises:
        UsageError: What would have stopped the run.
    """
    resolved = resolve_arguments("check", [a for a in arguments if a != "--json"])
    # A reward function may print; standard output holds the report only.
    with contextlib.redirect_stdout(sys.stderr):
        report = check_run(resolved)
    if "--json" in arguments:
        print(json.dumps(report, indent=1, ensure_ascii=False, default=str))
    else:
        print_report(report)


def check_run(resolved: Resolved) -> dict[str, Any]:
    """Load and check all but the weights; what there is to know, as plain values.

    Raises:
        UsageError: What would have stopped the run.
    """
    stages = stages_of(resolved)
    inputs = setup.load_inputs(resolved, stages)
    examples, tokenizer = inputs.dataset.examples, inputs.tokenizer
    shown = next((e for e in examples if e.demonstration_ids is not None), examples[0])
    values = flatten(resolved.config)
    return {
        "values": {key: [values[key], source] for key, source in resolved.sources.items()},
        "notes": [
            *dict.fromkeys(note for part in (resolved, *stages) for note in part.notes),
            *inputs.notes,
            *dict.fromkeys(
                f"the vLLM server {stage.config.rollout.vllm_server_base_url} has not been asked"
                for stage in stages
                if stage.config.objective.uses_rollouts and stage.config.rollout.behind_server
            ),
        ],
        "examples": len(examples),
        "with_demonstration": sum(e.demonstration_ids is not None for e in examples),
        "left_out": {reason: list(rows) for reason, rows in inputs.dataset.left_out.items()},
        "rewards": {
            reward.name: sum(reward.applies_to(e) for e in examples) for reward in inputs.rewarder.rewards
        },
        "reward_details": inputs.rewarder.details,
        "overlap": overlap_with_suites(inputs),
        "stages": [_stage_report(stage.config, inputs) for stage in stages],
        "memory": [_memory(stage.config, inputs) for stage in stages],
        "preview": _preview(shown, tokenizer),
    }


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    console = Console(highlight=False)
    table = Table("key", "value", "source", title="values that are not defaults")
    for key, (value, source) in report["values"].items():
        if source != "default":
            table.add_row(key, escape(str(value)), source)
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(f"data: {report['examples']} rows, {report['with_demonstration']} with a demonstration")
    for reason, rows in report["left_out"].items():
        listed = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        console.print(f"left out, {reason}: {len(rows)} rows ({listed})", markup=False)
    for name, count in report["rewards"].items():
        console.print(f"reward '{name}': applies to {count} rows, and was tried on up to two", markup=False)
    for name, found in report["overlap"].items():
        said = (
            f"{len(found['exact'])} training prompts are prompts of it, {len(found['ngram'])} share "
            f"{WIDTH} words in a row with one"
        )
        pairs = found["exact"] + found["ngram"]
        listed = "; ".join(f"row {ours} and its row {theirs}" for ours, theirs in pairs[:5])
        more = "; ..." if len(pairs) > 5 else ""
        warning = f"warning: {len(pairs)} of {report['examples']}: " if pairs else ""
        console.print(f"{warning}suite '{name}': {said}{': ' if pairs else ''}{listed}{more}", markup=False)
    for number, stage in enumerate(report["stages"], start=1):
        parts = ", ".join(f"{key} {value}" for key, value in stage.items())
        console.print(f"stage {number}: {parts}", markup=False)
        console.print(f"stage {number}: {report['memory'][number - 1]['text']}", markup=False)
    preview = report["preview"]
    console.print(f"row {preview['row']} as the model sees it (what is learnt from stands in [[ ]]):")
    console.print(preview["text"], markup=False)
    console.print("ok")


def overlap_with_suites(inputs: RunInputs) -> dict[str, dict[str, list[tuple[int, int]]]]:
    """Suite -> (training row, the suite's row) of prompts that are the same, and that share an n-gram."""
    ours = inputs.dataset.examples
    reports: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for suite in inputs.suites:
        found = overlap(
            [prompt_text(e.prompt) for e in ours], [prompt_text(e.prompt) for e in suite.examples]
        )
        pairs = {
            kind: [(ours[i].row, suite.examples[j].row) for i, j in places.items()]
            for kind, places in (("exact", found.exact), ("ngram", found.ngram))
        }
        pairs["ngram"] = [pair for pair in pairs["ngram"] if pair not in pairs["exact"]]
        reports[suite.name] = pairs
    return reports


def _memory(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """What a stage will take, in bytes and in words."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = estimate_memory(config, inputs, device)
    except UsageError:
        raise
    except Exception as error:  # whatever a model's own code does on tensors without data
        return {"text": f"memory: it could not be estimated ({error})"}
    return {**asdict(found), "peak": found.peak, "text": str(found)}


def _stage_report(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """The arithmetic of one stage: how many rows and tokens a step has, and how often the data is seen."""
    prompts, demonstrations = streams(config, inputs.dataset, inputs.rewarder)
    objective, batching = config.objective, config.batching
    report: dict[str, Any] = {"method": config.method, "steps": config.max_steps}
    if objective.uses_rollouts:
        drawn = batching.prompts_per_step * config.max_steps
        report["prompts"] = len(prompts)
        report["rollouts per step"] = batching.prompts_per_step * config.rollout.num_generations
        report["passes over the prompts"] = round(drawn / len(prompts), 2)
    if objective.mu_controller == "gate":
        report["prompts with a demonstration"] = sum(e.demonstration_ids is not None for e in prompts)
    elif objective.learns_from_demonstrations:
        drawn = batching.demonstrations_per_step * config.max_steps
        report["demonstrations"] = len(demonstrations)
        report["demonstrations per step"] = batching.demonstrations_per_step
        report["passes over the demonstrations"] = round(drawn / len(demonstrations), 2)
    if objective.lambda_adv > 0 and config.discriminator.kind == "bradley-terry":
        paired = sum(
            example.demonstration_ids is not None and not is_held_out(example, config) for example in prompts
        )
        report["prompts that the discriminator can learn from"] = paired
    return report


def _preview(example: Example, tokenizer: Any) -> dict[str, Any]:
    answer = tokenizer.decode(example.demonstration_ids) if example.demonstration_ids else ""
    return {"row": example.row, "text": f"{tokenizer.decode(example.prompt_ids)}[[{answer}]]"}
