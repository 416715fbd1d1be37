"""Train a recipe on a real model, with its own data and rewards."""

import json
import tempfile
import time

from stage import Report, parse, peak_memory

import uniapl
from uniapl.config.resolve import load_recipe, merge

STEPS = 20


def main() -> None:
    """Train 20 steps of the recipe; report the reward and the time of each step."""
    options = parse()
    report = Report("recipe", options)
    with tempfile.TemporaryDirectory() as name:
        values = merge(
            load_recipe(options.recipe), {"output_dir": name, "overwrite": True, "max_steps": STEPS}
        )
        start = time.perf_counter()
        with peak_memory(options) as memory:
            result = uniapl.train(values, quiet=True)
        report.set(seconds=time.perf_counter() - start, **memory)
        for line in (result.output_dir / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            report.row(f"step {record['step']}", seconds=record["step_time"], reward=record.get("reward"))
    report.finish()


if __name__ == "__main__":
    main()
