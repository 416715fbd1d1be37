"""Run cells in processes of their own. Finished cells are files and never run again."""

import concurrent.futures
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from uniapl.compare.cell import Job
from uniapl.compare.measures import criterion
from uniapl.compare.plan import Cell, Plan, Value, Variant
from uniapl.errors import UniAPLError

Outcome = dict[str, Any]
"""The result of :func:`uniapl.compare.cell.run_cell`."""
WORKER = (sys.executable, "-m", "uniapl.compare.cell")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs the cells of one comparison."""

    directory: Path
    jobs: int
    threads: int
    """Threads of each process."""
    cut: Mapping[str, Sequence[int]] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    eval_steps: int = 0
    keep_models: bool = False
    """Keep the trained model of each cell in `models`."""
    devices: Sequence[str] = ()
    """GPUs, of which each process gets one; empty leaves the choice to the process."""
    worker: Sequence[str] = WORKER
    console: Console = field(default_factory=lambda: Console(highlight=False))

    def file(self, cell: Cell) -> Path:
        """The outcome of a cell."""
        return self.directory / "cells" / f"{cell.name}.json"

    def model(self, cell: Cell) -> Path:
        """The directory of a cell's trained model, if models are kept."""
        return self.directory / "models" / cell.name

    def finished(self, cell: Cell) -> bool:
        """Whether the outcome of a cell exists."""
        return self.file(cell).exists()

    def read(self, cell: Cell) -> Outcome:
        """The outcome of a finished cell.

        Raises:
            UniAPLError: The file is damaged.
        """
        path = self.file(cell)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UniAPLError(
                f"cannot read the cell '{path}' ({error}): delete it to run it again"
            ) from error

    def run(self, cells: Sequence[Cell]) -> list[Outcome]:
        """The outcomes of the cells, in their order; outcomes on disk are not computed again.

        Raises:
            UniAPLError: Some cells failed; the outcomes of the others are on disk.
        """
        distinct = {cell.name: cell for cell in cells}.values()
        missing = [cell for cell in distinct if not self.finished(cell)]
        for cell in distinct:
            if self.finished(cell):
                # Left behind if the comparison was killed just after the cell was finished.
                self.file(cell).with_suffix(".log").unlink(missing_ok=True)
        if missing:
            text = f"{len(distinct)} runs, of which {len(missing)} remain, {self.jobs} at a time"
            self.console.print(text, markup=False)
            self._run_missing(missing)
        return [self.read(cell) for cell in cells]

    def _run_missing(self, cells: Sequence[Cell]) -> None:
        (self.directory / "cells").mkdir(parents=True, exist_ok=True)
        # What a killed comparison left behind.
        shutil.rmtree(self.directory / "work", ignore_errors=True)
        slots: queue.Queue[int] = queue.Queue()
        for slot in range(self.jobs):
            slots.put(slot)
        processes = _Processes()
        started, failures = time.monotonic(), list[str]()
        pool = concurrent.futures.ThreadPoolExecutor(self.jobs)
        try:
            running = {pool.submit(self._run_one, cell, slots, processes): cell for cell in cells}
            for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
                cell, reason = running[future], future.result()
                if reason is not None:
                    failures.append(f"{cell.name}: {reason}")
                    self.console.print(f"failed: {failures[-1]}", markup=False, soft_wrap=True)
                    continue
                left = (time.monotonic() - started) / number * (len(cells) - number) / 60
                took = f"{self.read(cell)['wall']:.0f} s; about {left:.0f} min left"
                self.console.print(f"{number}/{len(cells)} {cell.name}: {took}", markup=False)
        finally:
            # After an interruption, waiting cells are not started and running ones are ended.
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            shutil.rmtree(self.directory / "work", ignore_errors=True)
        if failures:
            raise UniAPLError(f"{len(failures)} of {len(cells)} runs failed:\n" + "\n".join(failures))

    def _run_one(self, cell: Cell, slots: "queue.Queue[int]", processes: "_Processes") -> str | None:
        """Run a cell; returns why it failed, or None."""
        slot = slots.get()
        try:
            job = Job(
                cell=cell,
                cut=self.cut,
                base=self.base,
                eval_steps=self.eval_steps,
                # A killed comparison's process may live for a second more, and deletes its own directory.
                work=str(self.directory / "work" / f"{cell.name}-{os.getpid()}"),
                result=str(self.file(cell)),
                model=str(self.model(cell)) if self.keep_models else None,
            )
            environment = os.environ | dict.fromkeys(THREADS, str(self.threads))
            if self.devices:
                environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
            log = self.file(cell).with_suffix(".log")
            with log.open("w", encoding="utf-8") as output:
                code = processes.run(self.worker, job.to_json(), environment, output)
            if code == 0 and self.finished(cell):
                log.unlink()
                return None
            last = next(
                (line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), ""
            )
            ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
            return f"{ended}: {last.strip() or 'no output'} (see {log})"
        finally:
            slots.put(slot)


class _Processes:
    """Processes that run, all of which can be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(self, command: Sequence[str], text: str, environment: Mapping[str, str], output: Any) -> int:
        """Run a process with a text on standard input, and return its exit code."""
        with self._lock:
            if self._ended:
                return -1
            # Its own session: Ctrl-C reaches this process only, which ends the others.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
        process.communicate(text)
        with self._lock:
            self._running.discard(process)
        return process.returncode

    def end(self) -> None:
        """End all processes."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()
            for process in self._running:
                process.wait()


def search(plan: Plan, variants: Sequence[Variant], runner: Runner) -> dict[str, dict[str, Value]]:
    """The same search for every method, on validation prompts: the learning rate, then the method's knob.

    If the best rate is at an end of the first round, the next one beyond it is tried too.

    Returns:
        For each variant the settings with the highest criterion, the first of equals.
    """
    low, *_, high = plan.rates
    beyond = {low: float(f"{low / 3:.2g}"), high: float(f"{high * 3:.2g}")}
    fixed = {v.label: v.settings.get("optim.learning_rate") for v in variants}
    tried = {v.label: search_cells(plan, v) for v in variants}

    def best() -> dict[str, dict[str, Value]]:
        runner.run([cell for cells in tried.values() for cell in cells])
        found: dict[str, dict[str, Value]] = {}
        for label, cells in tried.items():
            scores = [criterion(runner.read(cell)) for cell in cells]
            found[label] = dict(cells[scores.index(max(scores))].settings)
        return found

    first = best()
    for variant in variants:
        rate: Any = first[variant.label]["optim.learning_rate"]
        if rate in beyond and fixed[variant.label] is None:
            tried[variant.label] += plan.search_cells(variant, [beyond[rate]])
    second = best()
    for variant in variants:
        knob, values = variant.knob
        if knob not in variant.settings:
            rate = second[variant.label]["optim.learning_rate"]
            tried[variant.label] += plan.search_cells(variant, [rate], values)
    return best()


def search_cells(plan: Plan, variant: Variant) -> list[Cell]:
    """The first round of the search of a variant."""
    fixed: Any = variant.settings.get("optim.learning_rate")
    return plan.search_cells(variant, plan.rates if fixed is None else [fixed])
