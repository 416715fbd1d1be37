"""Print the tables of docs/compare/runs.json: methods on the demo task with right and wrong rewards.

    python benchmarks/wrong_rewards.py

Each run of the file has its method, settings, seed, reward and final measurements.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from uniapl.intervals import student_interval

RUNS = Path(__file__).parents[1] / "docs" / "compare" / "runs.json"
NAMES = {
    "objective.beta": "beta",
    "objective.lambda_adv": "c",
    "discriminator.kind": "",
    "objective.adversarial_placement": "placement",
    "demonstrations": "demonstrations",
    "discriminator.mismatched_demonstrations": "mismatched",
    "discriminator.log_probability_features": "log-probabilities",
}
"""Settings that a row's name states, where they differ from uniapl's own or belong to a baseline."""
OURS = "uniapl"

Runs = dict[int, dict[str, Any]]
"""The runs of one method by seed."""


def name_of(run: dict[str, Any]) -> str:
    """The row of a run."""
    told = [f"{NAMES[k]} {v}".strip() for k, v in run["settings"].items() if k in NAMES]
    return ", ".join([run["method"], *told])


def tables() -> dict[str, str]:
    """A table in Markdown for each reward."""
    rewards: dict[str, dict[str, Runs]] = {}
    for run in json.loads(RUNS.read_text(encoding="utf-8")):
        rewards.setdefault(run["reward"], {}).setdefault(name_of(run), {})[run["seed"]] = run
    return {reward: _table(methods) for reward, methods in rewards.items()}


def _table(methods: dict[str, Runs]) -> str:
    lines = [
        "| method | seeds | good | uniapl minus this | new combinations | expert nll | length distance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(methods.items(), key=lambda item: -_mean(item[1], "good")):
        paired = sorted(runs.keys() & methods[OURS].keys())
        difference = ""
        if name != OURS and len(paired) > 1:
            values = [_good(methods[OURS][seed]) - _good(runs[seed]) for seed in paired]
            found = student_interval(values)
            difference = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        combinations = fmean(run["final"]["held_out_combinations"]["good"] for run in runs.values())
        cells = [name, str(len(runs)), f"{_mean(runs, 'good'):.3f}", difference, f"{combinations:.3f}"]
        cells += [f"{_mean(runs, 'expert_nll'):.3f}", f"{_mean(runs, 'length_distance'):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(runs: Runs, measure: str) -> float:
    return fmean(run["final"]["held_out"][measure] for run in runs.values())


def _good(run: dict[str, Any]) -> float:
    return run["final"]["held_out"]["good"]


if __name__ == "__main__":
    for reward, table in tables().items():
        print(f"\n{reward}\n\n{table}")
