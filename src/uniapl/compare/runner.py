"""Run cells in parallel processes with one thread each. Finished cells are files and never run again."""

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
    """The outcomes of the cells, in their order; outcomes on disk are not computed again.

    Args:
        run: Replaces :func:`uniapl.compare.cell.run_cell`; called in a separate process.

    Raises:
        UniAPLError: Some cells failed; the outcomes of the others are on disk.
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
            # After an interruption, waiting cells are not started.
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
        pool.submit(_in_fresh_process, _make_reference, reference).result()
    started = time.monotonic()
    failures: list[str] = []
    running = {pool.submit(_in_fresh_process, run, cell, reference): cell for cell in cells}
    for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
        cell = running[future]
        try:
            outcome = future.result()
        except Exception as error:  # any failure of a cell: the others continue
            failures.append(f"{cell.name}: {type(error).__name__}: {error}")
            console.print(f"failed: {failures[-1]}", markup=False)
            continue
        write_text(_file(directory, cell), json.dumps(outcome))
        good, seconds = outcome["final"]["held_out"]["good"], outcome["cost"]["seconds"]
        left = (time.monotonic() - started) / number * (len(cells) - number) / 60
        line = (
            f"{number}/{len(cells)} {cell.name}: good {good:.3f}, {seconds:.0f} s; about {left:.0f} min left"
        )
        console.print(line, markup=False)
    if failures:
        raise UniAPLError(f"{len(failures)} cells failed:\n" + "\n".join(failures))


def search(
    methods: Sequence[str], directory: Path, *, jobs: int, reward: str = "honest"
) -> dict[str, dict[str, Any]]:
    """The same search for every method, on validation prompts: the learning rate, then the method's setting.

    Returns:
        For each method the settings with the highest `good`, summed over held-out prompts and combinations;
        the first of equals.
    """
    low, *_, high = LEARNING_RATES
    beyond = {low: low / 2, high: high * 2}
    tried = {method: search_cells(method, LEARNING_RATES, reward=reward) for method in methods}

    def best() -> dict[str, dict[str, Any]]:
        run_cells([cell for cells in tried.values() for cell in cells], directory, jobs=jobs)
        return {method: _best(run_cells(cells, directory, jobs=jobs)) for method, cells in tried.items()}

    for method, settings in best().items():
        if (rate := settings["optim.learning_rate"]) in beyond:
            tried[method] += search_cells(method, [beyond[rate]], reward=reward)
    for method, settings in best().items():
        rate = settings["optim.learning_rate"]
        tried[method] += search_cells(method, [rate], KNOBS[method][1], reward=reward)
    return best()


def _best(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    best = max(outcomes, key=lambda o: sum(split["good"] for split in o["final"].values()))
    return best["cell"]["settings"]


def _file(directory: Path, cell: Cell) -> Path:
    return directory / "cells" / f"{cell.name}.json"


def _read(path: Path) -> Outcome:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UniAPLError(f"cannot read the cell '{path}' ({error}): delete it to run it again") from error


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a new process, so that a crash or leftover state affects no other cell."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_begin) as pool:
        return pool.submit(function, *arguments).result()


def _begin() -> None:
    """Use one thread, and discard the output."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def _run_cell(cell: Cell, reference: Path) -> Outcome:
    from transformers.utils import logging

    from uniapl.compare.cell import run_cell

    logging.disable_progress_bar()
    return run_cell(cell, reference)


def _make_reference(path: Path) -> None:
    from uniapl.compare.cell import make_reference

    make_reference(path)
