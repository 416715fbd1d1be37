"""The verb `compose`: base prompts in, prompts with instructions out, none of them a benchmark's."""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from uniapl.compose.wordings import FURTHER_CONFLICTS, KINDS, say
from uniapl.config import DataConfig
from uniapl.data import rows as data
from uniapl.errors import UsageError
from uniapl.evaluation.contamination import overlap
from uniapl.evaluation.suites import BENCHMARKS, parse_suite
from uniapl.files import write_text
from uniapl.rewards.checkers import conflicts
from uniapl.types import derive_seed, prompt_text

JOINERS = (" ", "\n", "\n\n")
DEMONSTRATIONS = ("completion", "chosen", "rejected")


def compose(arguments: Sequence[str]) -> int:
    """`uniapl compose`: how many prompts were written.

    Raises:
        UsageError: Rows or options that cannot be used, or prompts that overlap with a benchmark's.
    """
    options = _parse(arguments)
    console = Console(highlight=False)
    forbidden = all_conflicts()
    rows = data.read_rows(DataConfig(path=options.base))
    written: list[dict[str, Any]] = []
    seen: set[str] = set()
    dropped_demonstrations = False
    for number, row in rows:
        with data.named_source(options.base):
            base, before = _base_of(number, row)
        dropped_demonstrations |= any(row.get(name) is not None for name in DEMONSTRATIONS)
        for copy in range(options.per_prompt):
            rng = random.Random(derive_seed(options.seed, "compose", number, copy))
            composed = compose_prompt(base, rng, options.kinds, options.max_instructions, forbidden)
            known = json.dumps([before, composed["prompt"]])
            if known in seen:
                continue
            seen.add(known)
            if before is not None:
                composed["prompt"] = [*before, {"role": "user", "content": composed["prompt"]}]
            written.append({**composed, "base_row": number, "base": base})
    if not written:
        raise UsageError("nothing was composed: every base prompt is there already")
    written = _without_overlap(written, options, console)
    if not written:
        raise UsageError("nothing is left: every prompt overlaps with a benchmark's")
    lines = [json.dumps({key: value for key, value in row.items() if key != "base"}) for row in written]
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UsageError(f"'{options.output}' cannot be written: {error}") from error
    repeated = len(rows) * options.per_prompt - len(seen)
    if repeated:
        console.print(f"note: {repeated} prompts came out twice and stand once")
    if dropped_demonstrations:
        console.print("note: demonstrations are left out: they were not written for these instructions")
    console.print(f"{options.output}: {len(written)} prompts; reward: instruction_following", markup=False)
    return len(written)


def compose_prompt(
    base: str,
    rng: random.Random,
    kinds: Sequence[str],
    most: int,
    forbidden: Mapping[str, set[str]],
) -> dict[str, Any]:
    """A prompt with one to `most` instructions that can all be followed.

    Example:
        {"prompt": "Name a river. Do not use commas.", "instruction_id_list": ["punctuation:no_comma"],
         "kwargs": [{}]}
    """
    wanted = rng.randint(1, most)
    chosen: list[str] = []
    for kind in rng.sample(list(kinds), len(kinds)):
        if len(chosen) < wanted and not any(kind in forbidden[other] for other in chosen):
            chosen.append(kind)
    taken: set[str] = set()
    arguments = [KINDS[kind].draw(rng, base, taken) for kind in chosen]
    sentences = [say(KINDS[kind], given, rng) for kind, given in zip(chosen, arguments, strict=True)]
    joiner = rng.choice(JOINERS)
    prompt = joiner.join([base, " ".join(sentences)])
    return {"prompt": prompt, "instruction_id_list": chosen, "kwargs": arguments}


def all_conflicts() -> dict[str, set[str]]:
    """Kind -> kinds that cannot be followed together with it: lm-eval's table and ours, both ways."""
    table = {kind: set(others) for kind, others in conflicts().items()}
    for kind, others in FURTHER_CONFLICTS.items():
        for other in others:
            table[kind].add(other)
            table[other].add(kind)
    return table


def _base_of(number: int, row: Any) -> tuple[str, list[Any] | None]:
    """(what the user asks last, the messages before it); None for messages where the prompt is text."""
    if not isinstance(row, Mapping):
        raise UsageError(f"row {number} is not a mapping of columns to values: {row!r:.80}")
    if row.get("instruction_id_list") is not None:
        raise UsageError(f"row {number} has instructions already: compose its base prompt, or leave it out")
    column = "prompt" if row.get("prompt") is not None else "messages"
    prompt = row.get(column)
    if isinstance(prompt, str) and column == "prompt":
        if not prompt.strip():
            raise UsageError(f"row {number}: the prompt is empty")
        return prompt.strip(), None
    if prompt is None:
        raise UsageError(f"row {number} has no 'prompt' and no 'messages' (columns: {', '.join(row):.200})")
    messages = data.checked_messages(f"row {number}: '{column}'", prompt)
    if column == "messages" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    last = messages[-1] if messages else {"role": None, "content": None}
    if last["role"] != "user" or not isinstance(last["content"], str) or not last["content"].strip():
        raise UsageError(f"row {number}: '{column}' must end with a user's message, of text")
    return last["content"].strip(), messages[:-1]


def _without_overlap(
    written: list[dict[str, Any]], options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    if options.overlap == "allow":
        return written
    texts = [prompt_text(row["prompt"]) for row in written]
    bases = [row["base"] for row in written]
    hits: dict[int, str] = {}
    for name, path in (BENCHMARKS | dict(map(parse_suite, options.benchmarks))).items():
        try:
            rows = data.read_rows(DataConfig(path=path))
        except UsageError as error:
            raise UsageError(
                f"the prompts of {name} cannot be had, so overlap with them cannot be seen ({error}); give "
                f"--benchmarks {name}=PATH, or --overlap allow"
            ) from error
        prompts = [prompt for _, row in rows if isinstance(prompt := row.get("prompt"), str)]
        if len(prompts) < len(rows):
            raise UsageError(f"--benchmarks {name}: every row of '{path}' must have a 'prompt' that is text")
        # A short prompt is found by itself only: with instructions behind it, it is another text.
        for found in (overlap(texts, prompts), overlap(bases, prompts)):
            hits |= {place: f"{name} row {rows[other][0]}" for place, other in found.ngram.items()}
    if not hits:
        return written
    listed = "; ".join(
        f"row {written[place]['base_row']} and {where}" for place, where in list(hits.items())[:5]
    )
    if options.overlap == "refuse":
        raise UsageError(
            f"{len(hits)} prompts overlap with a benchmark's (13 words in a row, or all of it): {listed}; "
            "take these base prompts out, or say --overlap drop"
        )
    console.print(
        f"note: {len(hits)} prompts that overlap with a benchmark's are dropped: {listed}", markup=False
    )
    return [row for place, row in enumerate(written) if place not in hits]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl compose",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Base prompts times one to five of IFEval's 25 kinds of instructions, in words of our "
        "own: a training set for the reward instruction_following.",
    )
    add = parser.add_argument
    add("base", help="prompts, as for train")
    add("-o", "--output", type=Path, required=True, help="the .jsonl file to write")
    add("--per-prompt", type=int, default=1, help="composed prompts for each base prompt")
    add("--max-instructions", type=int, default=5, help="of one prompt")
    help_ = "kinds of instructions to use (default: all 25)"
    add("--kinds", nargs="+", default=argparse.SUPPRESS, metavar="KIND", help=help_)
    known = " and ".join(BENCHMARKS)
    help_ = f"files of {known} (else: from the Hub), and of others, whose prompts must not come out"
    add("--benchmarks", nargs="+", default=argparse.SUPPRESS, metavar="NAME=PATH", help=help_)
    add(
        "--overlap",
        choices=("refuse", "drop", "allow"),
        default="refuse",
        help="with the benchmarks' prompts",
    )
    add("--seed", type=int, default=0, help="of all that is drawn")
    options = parser.parse_args(arguments, argparse.Namespace(kinds=list(KINDS), benchmarks=[]))
    if options.output.suffix != ".jsonl":
        raise UsageError(f"--output '{options.output}' must end in .jsonl")
    if options.output.exists() and Path(options.base).exists() and options.output.samefile(options.base):
        raise UsageError("--output is the file of the base prompts: choose another")
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        raise UsageError(f"--kinds: unknown {', '.join(unknown)}; choose among {', '.join(KINDS)}")
    for name in ("per_prompt", "max_instructions"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    return options
