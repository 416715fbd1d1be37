"""`uniapl compose`: combine base prompts with checkable instructions."""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from uniapl.collect.rows import prompt_of
from uniapl.compose.demonstrations import SUPPORTED, compose_demonstration, demonstration_of
from uniapl.compose.prompts import all_conflicts, compose_prompt
from uniapl.compose.wordings import KINDS
from uniapl.config import DataConfig
from uniapl.data.conversations import TEMPLATE_INPUTS
from uniapl.data.reading import named_source, read_rows
from uniapl.errors import UsageError
from uniapl.evaluation.contamination import overlap
from uniapl.evaluation.suites import BENCHMARKS, parse_suite
from uniapl.files import write_text
from uniapl.types import derive_seed, prompt_text


def compose(arguments: Sequence[str]) -> int:
    """`uniapl compose`: the number of prompts written.

    Raises:
        UsageError: Rows or options cannot be used, or prompts overlap with a benchmark's.
    """
    options = _parse(arguments)
    console = Console(highlight=False)
    rows = read_rows(DataConfig(path=options.base))
    notes: Counter[str] = Counter()
    composed = _composed(rows, options, notes)
    said = [f"{count} {note}" for note, count in notes.items()]
    if not composed:
        raise UsageError(f"no prompt is left: {'; '.join(said)}")
    written = _without_overlap(composed, options, console)
    if not written:
        raise UsageError("no prompt is left: every composed prompt overlaps with a benchmark's")
    lines = [json.dumps({key: value for key, value in row.items() if key != "base"}) for row in written]
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UsageError(f"cannot write '{options.output}': {error}") from error
    for note in said:
        console.print(f"note: {note}", markup=False)
    kind = "prompts with demonstrations" if options.from_demonstrations else "prompts"
    console.print(f"{options.output}: {len(written)} {kind}; reward: instruction_following", markup=False)
    return len(written)


def _composed(
    rows: Sequence[tuple[int, Any]], options: argparse.Namespace, notes: Counter[str]
) -> list[dict[str, Any]]:
    """The distinct composed prompts of all rows, each with its base prompt as `base`.

    `notes` counts what is left out.
    """
    forbidden = all_conflicts()
    composed: dict[str, dict[str, Any]] = {}
    for number, row in rows:
        with named_source(rows):
            base, before, answered = _base_of(number, row)
            inputs = {name: row[name] for name in TEMPLATE_INPUTS if row.get(name) is not None}
            demonstration = demonstration_of(number, row) if options.from_demonstrations else None
        if options.from_demonstrations and demonstration is None:
            notes["rows without a demonstration of plain text (no tool call, no <think>) were left out"] += 1
            continue
        if note := _note_on_completions(row, options, is_dialog=answered):
            notes[note] += 1
        for copy in range(options.per_prompt):
            rng = random.Random(derive_seed(options.seed, "compose", number, copy))
            given = (rng, options.kinds, options.max_instructions, forbidden)
            if demonstration is None:
                one = compose_prompt(base, *given)
            else:
                one = compose_demonstration(base, demonstration, *given)
            if one is None:
                notes["prompts were dropped: their demonstration can follow none of the instructions"] += 1
                continue
            key = json.dumps([before, one["prompt"], one.get("completion"), inputs])
            if key in composed:
                notes["duplicate prompts were dropped"] += 1
                continue
            if before is not None:
                one["prompt"] = [*before, {"role": "user", "content": one["prompt"]}]
            composed[key] = {**one, **inputs, "base_row": number, "base": base}
    return list(composed.values())


def _note_on_completions(row: Any, options: argparse.Namespace, *, is_dialog: bool) -> str | None:
    """The note on a row's completions that are not written."""
    if options.from_demonstrations:
        return (
            "rejected completions were left out: only demonstrations are edited"
            if row.get("rejected")
            else None
        )
    names = ("completion", "chosen", "rejected", "output")
    if is_dialog or any(row.get(name) is not None for name in names):
        return (
            "demonstrations were left out: they do not follow the new instructions; --from-demonstrations "
            "edits them so that they do"
        )
    return None


def _base_of(number: int, row: Any) -> tuple[str, list[Any] | None, bool]:
    """(last user message, messages before it, whether the messages end with an answer).

    The messages are None if the prompt is text.
    """
    column, prompt = prompt_of(number, row)
    if row.get("instruction_id_list") is not None:
        raise UsageError(f"row {number} already has instructions: use its base prompt, or remove the row")
    if isinstance(prompt, str):
        return prompt.strip(), None, False
    answered = column != "prompt" and prompt[-1]["role"] == "assistant"
    messages = prompt[:-1] if answered else prompt
    last = messages[-1] if messages else {"role": None, "content": None}
    if last["role"] != "user" or not isinstance(last["content"], str) or not last["content"].strip():
        before = " before its answer" if answered else ""
        raise UsageError(f"row {number}: '{column}' must end with a user message with text{before}")
    return last["content"].strip(), messages[:-1], answered


def _without_overlap(
    composed: list[dict[str, Any]], options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    if options.overlap == "allow":
        return composed
    hits: dict[int, str] = {}
    checked = dict(map(parse_suite, options.benchmarks)) or BENCHMARKS
    if others := BENCHMARKS.keys() - checked.keys():
        console.print(f"note: the prompts were not compared with those of {', '.join(sorted(others))}")
    for name, path in checked.items():
        try:
            rows = read_rows(DataConfig(path=path))
        except UsageError as error:
            raise UsageError(
                f"cannot read the prompts of {name} to check for overlap ({error}); set "
                f"--benchmarks {name}=PATH, or --overlap allow"
            ) from error
        prompts = [prompt for _, row in rows if isinstance(prompt := row.get("prompt"), str)]
        if len(prompts) < len(rows):
            raise UsageError(f"--benchmarks {name}: every row of '{path}' needs a text 'prompt'")
        # A short prompt is only found in its base, because instructions follow it in the composed prompt.
        for texts in ([prompt_text(row["prompt"]) for row in composed], [row["base"] for row in composed]):
            found = overlap(texts, prompts).ngram
            hits |= {place: f"{name} row {rows[other][0]}" for place, other in found.items()}
    if not hits:
        return composed
    first = list(hits.items())[:5]
    listed = "; ".join(f"row {composed[place]['base_row']} and {where}" for place, where in first)
    overlapping = f"{len(hits)} prompts overlap with a benchmark's"
    if options.overlap == "refuse":
        raise UsageError(
            f"{overlapping} (13 equal words in a row, or the complete prompt): {listed}; remove these base "
            "prompts, or set --overlap drop"
        )
    console.print(f"note: {overlapping} and were dropped: {listed}", markup=False)
    return [row for place, row in enumerate(composed) if place not in hits]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl compose",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Combine base prompts with one to five of IFEval's 25 kinds of instructions, in our own "
        "wordings: a training set for the reward instruction_following.",
    )
    add = parser.add_argument
    add("base", help="prompts, in any format that train accepts")
    add("-o", "--output", type=Path, required=True, help="the .jsonl file to write")
    add("--per-prompt", type=int, default=1, help="composed prompts for each base prompt")
    add("--max-instructions", type=int, default=5, help="maximum number of instructions in a prompt")
    help_ = "edit each row's demonstration so that it follows the instructions, and write it as `completion`"
    add("--from-demonstrations", action="store_true", help=help_)
    help_ = f"kinds of instructions to use (default: all 25; --from-demonstrations: its {len(SUPPORTED)})"
    add("--kinds", nargs="+", default=argparse.SUPPRESS, metavar="KIND", help=help_)
    known = " and ".join(BENCHMARKS)
    help_ = f"benchmarks to check for overlap, from the Hub or from a file (default: {known} from the Hub)"
    add("--benchmarks", nargs="+", default=argparse.SUPPRESS, metavar="NAME[=PATH]", help=help_)
    help_ = "what to do with prompts that overlap with a benchmark's"
    add("--overlap", choices=("refuse", "drop", "allow"), default="refuse", help=help_)
    add("--seed", type=int, default=0, help="seed of all draws")
    options = parser.parse_args(arguments, argparse.Namespace(kinds=None, benchmarks=[]))
    if options.output.suffix != ".jsonl":
        raise UsageError(f"--output '{options.output}' must end in .jsonl")
    if options.output.exists() and Path(options.base).exists() and options.output.samefile(options.base):
        raise UsageError("--output is the file of the base prompts: choose another file")
    options.kinds = _kinds(options)
    for name in ("per_prompt", "max_instructions"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    return options


def _kinds(options: argparse.Namespace) -> list[str]:
    supported = SUPPORTED if options.from_demonstrations else KINDS
    chosen = list(supported) if options.kinds is None else options.kinds
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise UsageError(f"--kinds: unknown {', '.join(unknown)}; choose from {', '.join(supported)}")
    if others := [kind for kind in chosen if kind not in supported]:
        raise UsageError(
            f"--kinds: --from-demonstrations cannot edit answers for {', '.join(others)}; choose from "
            f"{', '.join(supported)}"
        )
    return chosen
