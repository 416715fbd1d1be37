"""`uniapl recipes`: list the recipes that come with the package, and copy them."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import uniapl
from uniapl.cli.writing import write_new


def recipes(arguments: Sequence[str]) -> None:
    """List the recipes, or copy all of them with the files that they need.

    Raises:
        UsageError: A file exists with another content, or cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="uniapl recipes",
        description="List the recipes that come with the package. -o copies them and the files they need.",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIRECTORY",
        type=Path,
        help="directory to copy them to; their commands expect it to be `recipes`",
    )
    options = parser.parse_args(arguments)
    source = shipped()
    found = sorted(path.relative_to(source) for path in _files(source))
    if options.output:
        write_new(options.output, {path: (source / path).read_text(encoding="utf-8") for path in found})
        print(f"copied {len(found)} files to {options.output}; {options.output}/README.md describes them")
        return
    for path in found:
        if path.suffix == ".yaml" and path.parts[0] != "accelerate":
            print(f"{path.as_posix():<24} {_summary(source / path)}")
    print("\n`uniapl recipes -o recipes` copies them.")


def shipped() -> Path:
    """The recipes inside the installed package, or those of the repository in an editable installation."""
    package = Path(uniapl.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent.parent / "recipes"


def _files(source: Path) -> Iterator[Path]:
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _summary(path: Path) -> str:
    """The first sentence of a recipe's comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return f"{' '.join(lines).split('. ')[0].removesuffix('.')}."
