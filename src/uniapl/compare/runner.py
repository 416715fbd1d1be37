"""Runs cells in parallel processes, one thread each; every finished cell is a file, never run again."""

import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from uniapl.compare.plan import KNOBS, LEARNING_RATES, Cell, search_cells
from uniapl.compare.results import Outcome
from uniapl.errors import UniAPLError
from uniapl.files import write_text


def run_cells(
    cells: Sequence[Cell], directory: Path, *, jobs: int, run: Callable[[Cell, Path], Outcome] | None = None
) -> list[Outcome]:
    """The outcomes of all cells, in their order; those that are on disk already are read from there.

    Args:
        run: What runs a cell, given the reference model's place, in a process of its own.

    Raises:
        UniAPLError: Some cells failed; the others ran to their end and are on disk.
    """
    distinct = {cell.name: cell for cell in cells}.values()
    missing = [cell for cell in distinct if not _file(directory, cell).exists()]
    if missing:
        console = Console(highlight=False)
        console.print(f"{len(distinct)} cells, {len(missing)} to run, {jobs} at a time", markup=False)
        (directory / "cells").mkdir(parents=True, exist_ok=True)
        pool = concurrent.futures.ThreadPoolExecutor(jobs)
        try:
            _run_missing(missing, directory, pool, run or _run_cell, console)
        finally:
            # Interrupted: the cells that wait are not started.
            pool.shutdown(wait=False, cancel_futures=True)
    return [_read(_file(directory, cell)) for cell in cells]


def _run_missing(
    cells: Sequence[Cell],
    directory: Path,
    pool: concurrent.futures.Executor,
    run: Callable[[Cell, Path], Outcome],
    console: Console,
) -> None:
    reference = directory / "reference"
    if not reference.exists():
        pool.submit(_alone, _make_reference, reference).result()
    started = time.monotonic()
    failures: list[str] = []
    running = {pool.submit(_alone, run, cell, reference): cell for cell in cells}
    for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
        cell = running[future]
        try:
            outcome = future.result()
        except Exception as error:  # a cell may fail in any way; the others go on
            failures.append(f"{cell.name}: {type(error).__name__}: {error}")
            console.print(f"failed: {failures[-1]}", markup=False)
            continue
        write_text(_file(directory, cell), json.dumps(outcome))
        good = outcome["final"]["held_out"]["good"]
        left = (time.monotonic() - started) / number * (len(cells) - number) / 60
        console.print(
            f"{number}/{len(cells)} {cell.name}: good {good:.3f}, "
            f"{outcome['cost']['seconds']:.0f} s; about {left:.0f} min left",
            markup=False,
        )
    if failures:
        raise UniAPLError(f"{len(failures)} cells failed; what they said:\n" + "\n".join(failures))


def search(methods: Sequence[str], directory: Path, *, jobs: int) -> dict[str, dict[str, Any]]:
    """The same search for every method, on validation prompts: the learning rate, then the method's own knob.

    Returns:
        Per method the settings with the highest `good`, held-out prompts and combinations together; of equals
        those that were tried first.
    """
    low, *_, high = LEARNING_RATES
    beyond = {low: low / 2, high: high * 2}
    tried = {method: search_cells(method, LEARNING_RATES) for method in methods}

    def best() -> dict[str, dict[str, Any]]:
        run_cells([cell for cells in tried.values() for cell in cells], directory, jobs=jobs)
        return {method: _best(run_cells(cells, directory, jobs=jobs)) for method, cells in tried.items()}

    for method, settings in best().items():
        if (rate := settings["optim.learning_rate"]) in beyond:
            tried[method] += search_cells(method, [beyond[rate]])
    for method, settings in best().items():
        tried[method] += search_cells(method, [settings["optim.learning_rate"]], KNOBS[method][1])
    return best()


def _best(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The settings of the best outcome."""
    best = max(outcomes, key=lambda o: sum(split["good"] for split in o["final"].values()))
    return best["cell"]["settings"]


def _file(directory: Path, cell: Cell) -> Path:
    return directory / "cells" / f"{cell.name}.json"


def _read(path: Path) -> Outcome:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UniAPLError(
            f"the cell '{path}' cannot be read ({error}): delete it, and it is run again"
        ) from error


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Called in a fresh process: what one cell leaves behind, or is killed by, concerns no other."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_begin) as pool:
        return pool.submit(function, *arguments).result()


def _begin() -> None:
    """One thread per process, and no output but the runner's."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the life of the process)


def _run_cell(cell: Cell, reference: Path) -> Outcome:
    from transformers.utils import logging

    from uniapl.compare.cell import run_cell

    logging.disable_progress_bar()
    return run_cell(cell, reference)


def _make_reference(path: Path) -> None:
    from uniapl.compare.cell import make_reference

    make_reference(path)
