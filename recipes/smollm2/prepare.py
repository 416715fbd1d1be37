"""Make the data of recipes/smollm2: questions with short answers, composed with checkable instructions.

    python recipes/smollm2/prepare.py ANSWERS.json --output-dir build/smollm2

ANSWERS has a `prompt` and a `completion` in each row, or is a file of AlpacaEval's (`instruction`, `output`).
Rows without an answer, repeated questions, and rows with a long prompt or answer (the model is sampled on a
CPU) are left out. The others are divided
into three files before instructions are added, so that no question occurs in two of them: train.jsonl,
validation.jsonl (to choose settings) and held_out.jsonl.
"""

import argparse
import json
import random
from pathlib import Path

from uniapl.cli import run
from uniapl.config import DataConfig
from uniapl.data.formats import standard_columns
from uniapl.data.reading import read_rows
from uniapl.errors import UsageError

PARTS = {"held_out": (60, 3), "validation": (20, 3), "train": (None, 4)}
"""Part -> (number of questions, composed prompts for each question); None takes what remains."""


def read_answers(path: str) -> dict[str, str]:
    """Question -> its first answer."""
    answers: dict[str, str] = {}
    for _, row in read_rows(DataConfig(path=path)):
        known = {name: value for name, value in row.items() if value is not None}
        columns = standard_columns(known, known)
        question, answer = columns.get("prompt"), columns.get("completion")
        if isinstance(question, str) and isinstance(answer, str):
            answers.setdefault(question, answer)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("answers")
    parser.add_argument("--output-dir", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--max-words", type=int, default=45, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--max-prompt-words", type=int, default=60, help="longest prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--benchmarks", nargs="+", default=[], metavar="NAME=PATH", help="as in uniapl compose"
    )
    options = parser.parse_args()
    try:
        answers = read_answers(options.answers)
    except UsageError as error:
        parser.error(str(error))
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in answers.items()
        if len(completion.split()) <= options.max_words and len(prompt.split()) <= options.max_prompt_words
    ]
    random.Random(0).shuffle(rows)
    print(f"{len(rows)} questions with short answers")
    least = 1 + sum(count or 0 for count, _ in PARTS.values())
    if len(rows) < least:
        parser.error(
            f"'{options.answers}' has {len(rows)} distinct questions with short answers, and the three files "
            f"need at least {least}: add answers, or raise --max-words or --max-prompt-words"
        )
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for part, (count, copies) in PARTS.items():
        own, rows = rows[:count], rows[count:] if count else []
        questions = options.output_dir / f"{part}_questions.jsonl"
        questions.write_text("".join(f"{json.dumps(row)}\n" for row in own))
        words = [
            "compose",
            str(questions),
            "-o",
            str(options.output_dir / f"{part}.jsonl"),
            "--from-demonstrations",
        ]
        words += ["--per-prompt", str(copies), "--max-instructions", "3", "--overlap", "drop"]
        if code := run([*words, *(["--benchmarks", *options.benchmarks] if options.benchmarks else [])]):
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
