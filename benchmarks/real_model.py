"""Print the tables of docs/compare/smollm2.json: methods on SmolLM2-135M (recipes/smollm2).

    python benchmarks/real_model.py
    python benchmarks/real_model.py --add runs/smollm2-compare/cells

The second command first adds the finished cells of a comparison, without their texts, which may not be passed
on.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uniapl.compare import results
from uniapl.compare.judge import load_judge
from uniapl.compare.statistics import paired_difference
from uniapl.intervals import Interval, student_interval

RUNS = Path(__file__).parents[1] / "docs" / "compare" / "smollm2.json"
MAIN = ("held_out", "followed")
OURS = "uniapl"

Runs = dict[str, list[results.Run]]
"""Label of a method -> its runs, in the order of their seeds."""
Value = Callable[[results.Run], float]


def of_score(name: str) -> Value:
    """The mean of a score over the held-out prompts."""
    return lambda run: run["scores"][MAIN[0]][name]["mean"]


def of_measure(name: str) -> Value:
    """A measure."""
    return lambda run: run["values"][name]


COLUMNS: dict[str, Value] = {
    "followed": of_score("followed"),
    "all": of_score("all_followed"),
    "judge": of_measure("judge"),
    "on topic": of_measure("on_topic"),
    "copied": of_score("copied"),
    "distinct-2": of_measure("distinct_2"),
    "tokens": of_measure("tokens"),
    "length distance": of_measure("length_distance"),
    "expert nll": of_measure("expert_nll"),
}
COMPARED = ("followed", "judge", "length distance", "expert nll")


def add_cells(runs: Runs, cells: Path, judge: str) -> None:
    """Add the runs of finished cells."""
    measure = load_judge(judge)
    for path in sorted(cells.glob("*.json")):
        outcome = json.loads(path.read_text(encoding="utf-8"))
        label, seed = outcome["cell"]["method"], outcome["cell"]["seed"]
        known = runs.setdefault(label, [])
        if seed not in [run["seed"] for run in known]:
            known.append(results.measure(outcome, MAIN, measure))
            known.sort(key=lambda run: run["seed"])


def shown(interval: Interval, digits: int, *, signed: bool = False) -> str:
    """A mean with its interval."""
    sign = "+" if signed else ""
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    text = f"{mean:{sign}.{digits}f}"
    return (
        text if low is None or high is None else f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    )


def rows(runs: Runs) -> list[list[str]]:
    """The table of the methods."""
    table = [["method", "seeds", *COLUMNS, "health rules", "trained tokens", "minutes"]]
    for label, found in runs.items():
        values = [student_interval([value(run) for run in found]) for value in COLUMNS.values()]
        digits = [0 if (v["mean"] or 0) >= 10 else 2 for v in values]
        first: dict[str, list[int]] = {}
        for run in found:
            for rule, step in run["warnings"].items():
                first.setdefault(rule, []).append(step)
        warned = "; ".join(f"{rule} {', '.join(map(str, steps))}" for rule, steps in first.items())
        cost = [
            student_interval([run["cost"][key] for run in found])["mean"]
            for key in ("trained_tokens", "seconds")
        ]
        table.append(
            [
                label,
                str(len(found)),
                *(shown(value, d) for value, d in zip(values, digits, strict=True)),
                warned,
                f"{cost[0]:,.0f}",
                f"{(cost[1] or 0) / 60:.0f}",
            ]
        )
    return table


def differences(runs: Runs) -> list[list[str]]:
    """uniapl minus each method, over the seeds that both have."""
    table = [[f"{OURS} minus", "seeds", *COMPARED]]
    ours = {run["seed"]: run for run in runs.get(OURS, [])}
    for label, found in runs.items():
        theirs = [run for run in found if run["seed"] in ours]
        if label == OURS or not theirs:
            continue
        values = (
            paired_difference(
                [COLUMNS[name](ours[run["seed"]]) for run in theirs], [COLUMNS[name](run) for run in theirs]
            )
            for name in COMPARED
        )
        table.append([label, str(len(theirs)), *(shown(value, 3, signed=True) for value in values)])
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", type=Path, metavar="CELLS", help="directory of finished cells")
    parser.add_argument("--judge", default="sentence-transformers/all-MiniLM-L6-v2")
    options = parser.parse_args()
    runs: Any = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else {}
    if options.add:
        add_cells(runs, options.add, options.judge)
        RUNS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows(runs)), markdown(differences(runs)), sep="\n\n")


if __name__ == "__main__":
    main()
