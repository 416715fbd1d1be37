"""The verb `report`: parse, read, write the page and what else was asked for."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from uniapl.errors import UsageError
from uniapl.report.comparison import is_comparison, write_comparison
from uniapl.report.page import write_report
from uniapl.report.reading import read_run


def report(arguments: Sequence[str]) -> Path:
    """`uniapl report`: where the page is.

    Raises:
        UsageError: A directory that holds no run, options that do not fit, or a file that cannot be written.
    """
    options = _parse(arguments)
    directories: list[Path] = options.runs
    output: Path = options.output or directories[0] / "report.html"
    if len(directories) > 1 and options.output is None:
        raise UsageError("the page of several runs belongs to none of them: say where, by -o FILE")
    if len(directories) > 1 and options.model_analysis:
        raise UsageError("--model-analysis looks at one run at a time")
    compared = [directory for directory in directories if is_comparison(directory)]
    if compared and (len(directories) > 1 or options.model_analysis or options.figures):
        raise UsageError(f"'{compared[0]}' is a comparison: it has a page of its own, without other options")
    try:
        if compared:
            write_comparison(compared[0], output)
            print(output)
            return output
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
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error}") from error
    print(output)
    return output


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="uniapl report",
        description="One HTML file that says what a run did, or how several compare: result, health, curves, "
        "lengths and diversity, and every sampled answer. It needs no network.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, or one of uniapl compare")
    add("-o", "--output", type=Path, metavar="FILE", help="default: RUN/report.html")
    add(
        "--model-analysis",
        action="store_true",
        help="score answers by the base and by the trained model first; the page shows it from then on",
    )
    add("--figures", type=Path, metavar="DIR", help="write the charts as PNG and SVG too, by matplotlib")
    return parser.parse_args(arguments)
