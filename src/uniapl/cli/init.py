"""`uniapl init`: write a first recipe with its rewards and example rows."""

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from uniapl.cli.writing import write_new
from uniapl.errors import UsageError

CASES = {
    "math": "problems with a number as the answer, and worked solutions",
    "instructions": "instructions that a program checks, with some answers",
    "style": "conversations in a style; a discriminator in place of a reward",
    "preferences": "pairs of a preferred and a rejected answer (DPO)",
    "tools": "questions that need a tool, with an expert's trajectories",
}
"""Name of a case -> its description; `uniapl/starters` has a directory for each."""
MODELS = {"tools": "Qwen/Qwen3-0.6B"}
"""Models of the cases that need a larger one."""
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def init(arguments: Sequence[str]) -> None:
    """Write the files of a case to a new directory.

    Raises:
        UsageError: There is no such case, or a file exists or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="uniapl init",
        description="Write a first recipe with comments, its reward function and ten example rows.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases:\n" + "".join(f"  {name:<13} {text}\n" for name, text in CASES.items()),
    )
    parser.add_argument("case", metavar="CASE", help="the kind of data, see below")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIRECTORY",
        type=Path,
        help="directory of the files; by default the case's name",
    )
    parser.add_argument(
        "--model", help=f"directory or Hub id of the model (default: {MODEL}, or {MODELS['tools']} for tools)"
    )
    options = parser.parse_args(arguments)
    if options.case not in CASES:
        raise UsageError(f"unknown case '{options.case}': choose one of {', '.join(CASES)}")
    directory = options.output or Path(options.case)
    model = options.model or MODELS.get(options.case, MODEL)
    source = files("uniapl") / "starters" / options.case
    texts = {file.name: file.read_text(encoding="utf-8") for file in source.iterdir() if file.is_file()}
    # The words are in capitals in the files, so that these remain YAML and Python.
    replaced = {
        Path(name): text.replace("DIRECTORY", directory.as_posix()).replace("MODEL", model)
        for name, text in texts.items()
    }
    write_new(directory, replaced)
    print(f"wrote {', '.join(sorted(texts))} to {directory}; next:\n")
    print(f"    uniapl check {directory.as_posix()}/recipe.yaml")
