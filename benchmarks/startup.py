"""Time of `uniapl --help` and `uniapl check`, and their slowest imports.

python benchmarks/startup.py [--repeats 5] [--json FILE]
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import yaml

LIMITS = {"uniapl --help": 0.3, "uniapl check": 5.0}
"""Limit of each command in seconds."""


def commands(folder: Path) -> dict[str, list[str]]:
    """The measured commands; `uniapl check` gets a small recipe for the demo model."""
    rows = [{"prompt": "write one sentence", "completion": "the cat sees a dog ."}] * 64
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"model_name_or_path": str(files("uniapl.demo") / "base")},
        "data": {"path": str(folder / "train.jsonl"), "prompt_format": "chat"},
        "rewards": {"functions": ["lowercase"]},
        "rollout": {"max_completion_length": 48},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    start = [sys.executable, "-m", "uniapl.cli"]
    return {
        "uniapl --help": [*start, "--help"],
        "uniapl check": [*start, "check", str(folder / "recipe.yaml")],
    }


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds of a command; other load on the machine affects mainly the first."""
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def imports(command: list[str], *, count: int = 8) -> dict[str, float]:
    """Seconds of the slowest top-level package imports, each including the modules that it imports."""
    timed = [command[0], "-X", "importtime", *command[1:]]
    text = subprocess.run(timed, check=True, capture_output=True, text=True).stderr
    lines = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| \s*([\w.]+)$", text, re.MULTILINE)
    found = {name: int(microseconds) / 1e6 for microseconds, name in lines if "." not in name}
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True)[:count])


def main() -> None:
    """Print the time and limit of each command; exit with 1 if a command exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as name:
        todo = commands(Path(name))
        times: dict[str, list[float]] = {what: [] for what in todo}
        used: dict[str, list[float]] = {what: [] for what in todo}
        # The first round is not counted, because it reads the files from disk.
        for repeat in range(options.repeats + 1):
            for what, command in todo.items():
                took, processors = seconds(command)
                if repeat:
                    times[what].append(took)
                    used[what].append(processors)
        for what, command in todo.items():
            middle, longest = statistics.median(times[what]), imports(command)
            found[what] = {
                "seconds": times[what],
                "processor_seconds": used[what],
                "limit": LIMITS[what],
                "imports": longest,
            }
            print(f"{what}: {middle:.2f} s ({min(times[what]):.2f} to {max(times[what]):.2f})", end="")
            print(f", CPU {statistics.median(used[what]):.2f} s, limit {LIMITS[what]} s; imports:")
            print("    " + ", ".join(f"{package} {took:.2f}" for package, took in longest.items()))
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "startup", "commands": found}, indent=1) + "\n")
    if any(min(times[what]) > LIMITS[what] for what in LIMITS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
