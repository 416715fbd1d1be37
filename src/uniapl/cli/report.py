"""`uniapl report`: write the report of runs or of a comparison."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from uniapl.errors import UsageError
from uniapl.report.comparison import is_comparison, write_comparison
from uniapl.report.page import write_report
from uniapl.report.reading import read_run


def report(arguments: Sequence[str]) -> Path:
    """`uniapl report`: the path of the page.

    Raises:
        UsageError: A directory contains no run, options contradict each other, or a file cannot be written.
    """
    options = _parse(arguments)
    directories: list[Path] = options.runs
    output: Path = options.output or directories[0] / "report.html"
    if len(directories) > 1 and options.output is None:
        raise UsageError("several runs are written to one page: set -o FILE")
    if len(directories) > 1 and options.model_analysis:
        raise UsageError("--model-analysis needs exactly one run")
    compared = [directory for directory in directories if is_comparison(directory)]
    if compared and (len(directories) > 1 or options.model_analysis or options.figures):
        raise UsageError(f"'{compared[0]}' is a comparison: report it separately, without other options")
    try:
        if compared:
            write_comparison(compared[0], output)
        else:
            _write(directories, output, options)
    except OSError as error:
        raise UsageError(f"cannot write the report: {error}") from error
    print(output)
    return output


def _write(directories: Sequence[Path], output: Path, options: argparse.Namespace) -> None:
    if options.model_analysis:
        from transformers.utils import logging

        from uniapl.report.models import analyse_models

        logging.disable_progress_bar()
        analyse_models(read_run(directories[0]))
    if options.figures is not None:
        from uniapl.report.figures import write_figures

        for path in write_figures([read_run(directory) for directory in directories], options.figures):
            print(path)
    write_report(directories, output)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl report",
        description="Write an HTML report of one or several runs: result, health, curves, lengths and "
        "diversity, every sampled completion, settings. The page works offline.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, or of uniapl compare")
    add("-o", "--output", type=Path, metavar="FILE", help="file to write (default: RUN/report.html)")
    help_ = "score completions with the base and the trained model first; later reports include the result"
    add("--model-analysis", action="store_true", help=help_)
    add("--figures", type=Path, metavar="DIR", help="write the charts as PNG and SVG with matplotlib")
    return parser.parse_args(arguments)
