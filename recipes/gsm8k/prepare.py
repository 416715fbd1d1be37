r"""Make the data of recipes/gsm8k/recipe.yaml: GSM8K with its final answers in \boxed{}.

    python recipes/gsm8k/prepare.py                                        # openai/gsm8k on the Hub
    python recipes/gsm8k/prepare.py --train train.jsonl --test test.jsonl  # files of openai/grade-school-math

Each row has the question as `prompt`, the final answer as `solution`, and as `completion` the solution
without the calculator's annotations (<<4*9=36>>). The last line is "The answer is \boxed{N}." in place of
"#### N", because accuracy_reward reads only LaTeX.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from uniapl.config import DataConfig
from uniapl.data.reading import read_rows
from uniapl.errors import UsageError

ANSWER = re.compile(r"\n#### *(-?[\d,]*\.?\d+)\s*\Z")


def converted(row: dict[str, Any]) -> dict[str, str]:
    """A row of GSM8K in the form of the recipe; a ValueError if its answer does not end with "#### N"."""
    text = re.sub(r"<<.*?>>", "", row["answer"])
    match = ANSWER.search(text)
    if match is None:
        raise ValueError('its answer does not end with a line "#### N"')
    number = match[1].replace(",", "")
    solution = f"{text[: match.start()]}\nThe answer is \\boxed{{{number}}}."
    return {"prompt": row["question"], "completion": solution, "solution": number}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", help="file of the training set (default: the Hub's)")
    parser.add_argument("--test", help="file of the test set (default: the Hub's)")
    parser.add_argument("--output-dir", type=Path, default=Path("build/gsm8k"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for split, path in (("train", options.train), ("test", options.test)):
        hub = DataConfig(path="openai/gsm8k", name="main", split=split)
        lines: list[str] = []
        try:
            for number, row in read_rows(DataConfig(path=path) if path else hub):
                try:
                    lines.append(json.dumps(converted(row), ensure_ascii=False) + "\n")
                except (KeyError, ValueError) as error:
                    raise UsageError(f"{path or 'openai/gsm8k'}, row {number}: {error}") from error
        except UsageError as error:
            parser.error(str(error))
        output = options.output_dir / f"{split}.jsonl"
        output.write_text("".join(lines))
        print(f"{output}: {len(lines)} problems")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
