"""All parts of the torture, their figures on the console and in a file."""

import argparse
import collections
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torture import chains, damage, disk, stops
from torture.chains import Chain
from torture.points import POINTS
from torture.setting import Setting, make_setting

COMMAND_KILLS = 10
"""Of the kills, so many at least are of processes started by exec."""
STOPS = 10
MOST_CHAINS = 200
Part = dict[str, Any]
"""Figures, with a list of complaints."""


def main() -> None:
    """Exit with 1 if any run came out wrong; what it left is then kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120, help="kills to survive at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--output", type=Path, default=Path("build/torture.json"), help="where figures go")
    options = parser.parse_args()
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="uniapl-torture-"))
    setting = make_setting(directory)
    print(f"first step after {setting.start_seconds:.1f} s, by exec after {setting.command_seconds:.1f} s")
    report: dict[str, Any] = {
        "kills": kill(setting, options.kills, options.seed),
        "signals": interrupt(setting, options.seed),
        "disks": starve(setting),
        "damage": spoil(setting, options.seed),
    }
    report["seconds"] = round(time.monotonic() - began)
    report["equal"] = not any(part["complaints"] for part in report.values() if isinstance(part, dict))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    if not report["equal"]:
        print(f"failed; the runs are kept in {directory}")
        sys.exit(1)
    shutil.rmtree(directory)
    print(f"every run came out right, in {report['seconds']} s; figures: {options.output}")


def kill(setting: Setting, kills: int, seed: int) -> Part:
    """Chains until so many kills were survived and every point was hit."""
    done: list[Chain] = []
    complaints: list[str] = []
    for chain in _chains(setting, kills, seed, done):
        done.append(chain)
        last = chain.kills[-1] if chain.kills else "none"
        complaints += [f"{chain.run}, the last kill at '{last}': {found}" for found in chain.complaints]
        where = collections.Counter(place for chain in done for place in chain.kills)
        left = sum(not where[point] for point in POINTS)
        print(f"{len(done)} runs, {where.total()} kills, {left} points to go", flush=True)
    # A difference ends the part before every point has had its turn.
    complaints = complaints or [f"no kill {point}" for point in POINTS if not where[point]]
    for place, count in sorted(where.items(), key=lambda item: -item[1]):
        print(f"{count:6} {place}")
    part = {
        "survived": where.total(),
        "runs": len(done),
        "starts from an older checkpoint": sum(chain.went_back for chain in done),
        "where": dict(where),
    }
    return _close("kills", part, complaints)


def _chains(setting: Setting, kills: int, seed: int, done: Sequence[Chain]) -> Iterator[Chain]:
    """Chains as they end, two at a time; `done` are those that the caller has seen."""
    with _pool() as pool:
        running: set[Future[Chain]] = set()
        for number in range(MOST_CHAINS):
            where = collections.Counter(place for chain in done for place in chain.kills)
            by_command = where[chains.AS_COMMAND]
            rarest = sorted(POINTS, key=lambda point: where[point])
            if where.total() >= kills and by_command >= COMMAND_KILLS and where[rarest[0]]:
                break
            if any(chain.complaints for chain in done):
                break
            # Every other slot, so that chains that run side by side do not all hunt the same point.
            wanted = rarest[number % 2 :: 2][:8]
            as_command = by_command < COMMAND_KILLS and number % 4 == 1
            running.add(
                pool.submit(chains.live, setting, 1000 * seed + number, wanted, as_command=as_command)
            )
            if len(running) == 2:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
        yield from (future.result() for future in running)


def interrupt(setting: Setting, seed: int) -> Part:
    """SIGINT and SIGTERM by turns."""
    with _pool() as pool:
        found = [pool.submit(stops.stop, setting, 1000 * seed + number) for number in range(STOPS)]
        stopped = [future.result() for future in found]
    codes = collections.Counter(f"{stop.signal}: exit code {stop.code}" for stop in stopped)
    complaints = [f"{stop.run}: {complaint}" for stop in stopped for complaint in stop.complaints]
    return _close("signals", {"sent": STOPS, "codes": dict(codes)}, complaints)


def starve(setting: Setting) -> Part:
    """Full and read-only disks."""
    with _pool() as pool:
        if reason := pool.submit(disk.namespace).result():
            return _close("disks", {"skipped": reason}, [])
        found = [pool.submit(disk.starve, setting, what, amount) for what, amount in disk.cases(setting)]
        shortages = [future.result() for future in found]
    for shortage in shortages:
        print(f"  {shortage.case}: exit code {shortage.code} at step {shortage.at_step}")
    complaints = [
        f"{shortage.case}: {complaint}" for shortage in shortages for complaint in shortage.complaints
    ]
    codes = collections.Counter(
        f"{shortage.case.rstrip('0123456789 ')}: exit code {shortage.code}" for shortage in shortages
    )
    cases = [asdict(shortage) for shortage in shortages]
    return _close("disks", {"codes": dict(codes), "cases": cases}, complaints)


def spoil(setting: Setting, seed: int) -> Part:
    """Damaged checkpoints."""
    flips, complaints = damage.flip_manifest(setting)
    with _pool() as pool:
        found = [
            pool.submit(damage.damage, setting, *case, 1000 * seed + number)
            for number, case in enumerate(damage.cases(setting))
        ]
        damages = [future.result() for future in found]
    complaints += [f"{found.run}: {complaint}" for found in damages for complaint in found.complaints]
    ways = collections.Counter(f"{found.way}{', both' * found.both}" for found in damages)
    return _close(
        "damage", {"starts": len(damages), "ways": dict(ways), "flips of manifest": flips}, complaints
    )


def _close(title: str, part: Part, complaints: list[str]) -> Part:
    """The part's line on the console; the part with its complaints."""
    shown = {key: value for key, value in part.items() if not isinstance(value, list)}
    print(
        f"{title}: {shown}, {'all equal' if not complaints else 'DIFFERENT'}",
        *complaints,
        sep="\n  ",
        flush=True,
    )
    return part | {"complaints": complaints}


def _pool() -> ProcessPoolExecutor:
    # Processes, not threads: whoever forks a run must not have any. Two, as runs go on at a time.
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))
