"""The tables of a comparison, computed from the outcomes of its cells, as results.json holds them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from uniapl.compare.plan import BASELINES, FRONTS
from uniapl.compare.statistics import (
    Point,
    cost_to_reach,
    distance_at_equal_good,
    good_at_equal_closeness,
    paired_difference,
)
from uniapl.intervals import Interval, student_interval
from uniapl.report.analysis import interval_text

Outcome = dict[str, Any]
"""The result of :func:`uniapl.compare.cell.run_cell`."""

SPLITS = ("held_out", "held_out_combinations")
MEASURES = (
    "good", "passed", "fluency", "expert_nll", "length_distance", "place_habit", "reference_nll",
    "distinct", "distinct_2",
)  # fmt: skip
COSTS = ("rollout_tokens", "trained_tokens", "seconds")


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Every method's means, its difference from the best baseline, and its cost to reach levels of `good`.

    The best baseline is chosen by these same results, so chance favours it.

    Args:
        outcomes: One outcome per seed for each method (and "base"), with the seeds in the same order.
    """
    present = [name for name in BASELINES if name in outcomes]
    best = max(present, key=lambda name: fmean(_final(outcomes[name], "held_out", "good")), default=None)
    levels = _levels(outcomes, best)
    rows: dict[str, Any] = {}
    for method, runs in outcomes.items():
        row: dict[str, Any] = {
            split: {name: student_interval(_final(runs, split, name)) for name in MEASURES}
            for split in SPLITS
        }
        row["cost"] = {name: fmean(run["cost"][name] for run in runs) for name in COSTS}
        if best is not None:
            row["minus_best_baseline"] = {s: _difference(runs, outcomes[best], s, "good") for s in SPLITS}
        if method != "base":
            curve = mean_curve(runs, outcomes["base"])
            row["rollout_tokens_to_reach"] = {
                f"{level:.3f}": cost_to_reach(curve["rollout_tokens"], curve["good"], level)
                for level in levels
            }
        rows[method] = row
    return {"best_baseline": best, "levels": levels, "methods": rows}


def short_table(table: Mapping[str, Any]) -> list[list[str]]:
    """The table as text for a terminal and a document: a header, and a row per method."""
    best = table["best_baseline"]
    rows = [
        f"method;good;difference from {best};new combinations;expert nll;length distance;tokens".split(";")
    ]
    for method, row in table["methods"].items():
        here, there = (row[split] for split in SPLITS)
        difference = row["minus_best_baseline"]["held_out"] if best and method != best else None
        rows.append(
            [
                method,
                f"{here['good']['mean']:.3f}",
                interval_text(difference, "+") if difference else "",
                f"{there['good']['mean']:.3f}",
                f"{here['expert_nll']['mean']:.3f}",
                f"{here['length_distance']['mean']:.2f}",
                f"{row['cost']['rollout_tokens']:,.0f}",
            ]
        )
    return rows


def mean_curve(runs: Sequence[Outcome], base: Sequence[Outcome]) -> dict[str, list[float]]:
    """The means over seeds of `good` and of the costs at each point of the curve; the base is the first."""
    curve: dict[str, list[float]] = {name: [0.0] for name in COSTS}
    curve["good"] = [fmean(_final(base, "held_out", "good"))]
    for points in zip(*(run["curve"] for run in runs), strict=True):
        for name in ("good", *COSTS):
            curve[name].append(fmean(point[name] for point in points))
    return curve


def fronts(
    outcomes: Mapping[str, Sequence[Sequence[Outcome]]], base: Sequence[Outcome], *, ours: str = "uniapl"
) -> dict[str, Any]:
    """The differences between our front and each other method's, on both splits, paired over seeds.

    The front of a method and a seed consists of its models along its setting, and the base. Fronts are
    compared by `good` at equal closeness, averaged over bounds on the distance, and by the distance at equal
    `good`, averaged over levels. The ranges are those of all methods' models.

    Args:
        outcomes: For each method and seed, one outcome per value of the setting.
        base: The base's outcome for each seed.
    """
    return {
        f"{split}/{distance}": _front(outcomes, base, ours, split, distance)
        for split in SPLITS
        for distance in ("expert_nll", "length_distance")
    }


def _front(
    outcomes: Mapping[str, Sequence[Sequence[Outcome]]],
    base: Sequence[Outcome],
    ours: str,
    split: str,
    distance: str,
) -> dict[str, Any]:
    points: dict[str, list[list[Point]]] = {
        method: [
            [(o["final"][split]["good"], o["final"][split][distance]) for o in (*swept, start)]
            for swept, start in zip(seeds, base, strict=True)
        ]
        for method, seeds in outcomes.items()
    }
    goods, distances = zip(*(p for seeds in points.values() for front in seeds for p in front), strict=True)
    bounds, levels = (min(distances), max(distances)), (min(goods), max(goods))
    measures = {
        method: {
            "good_at_equal_closeness": [good_at_equal_closeness(front, bounds) for front in seeds],
            "distance_at_equal_good": [distance_at_equal_good(front, levels, bounds[1]) for front in seeds],
            "best_good": [max(good for good, _ in front) for front in seeds],
        }
        for method, seeds in points.items()
    }
    methods: dict[str, Any] = {}
    for method, values in measures.items():
        row: dict[str, Any] = {name: student_interval(v) for name, v in values.items()}
        row["ours_minus_this"] = None
        if ours in points and method != ours:
            row["ours_minus_this"] = {
                name: paired_difference(measures[ours][name], v) for name, v in values.items()
            }
        knob, settings = FRONTS[method]
        row["points"] = [
            {
                "knob": knob,
                "value": value,
                "good": student_interval(_final(runs, split, "good")),
                "distance": student_interval(_final(runs, split, distance)),
            }
            for value, runs in zip(settings, zip(*outcomes[method], strict=True), strict=True)
        ]
        methods[method] = row
    return {"bounds": bounds, "levels": levels, "methods": methods}


def ablations(variants: Mapping[str, Sequence[Outcome]], uniapl: Sequence[Outcome]) -> dict[str, Any]:
    """The means of every variant and its difference from uniapl on the same seeds."""
    return {
        name: {
            split: {
                measure: {
                    **student_interval(_final(runs, split, measure)),
                    "difference": _difference(runs, uniapl, split, measure),
                }
                for measure in ("good", "fluency", "expert_nll", "length_distance")
            }
            for split in SPLITS
        }
        for name, runs in variants.items()
    }


def _difference(runs: Sequence[Outcome], others: Sequence[Outcome], split: str, name: str) -> Interval:
    return paired_difference(_final(runs, split, name), _final(others, split, name))


def _final(runs: Sequence[Outcome], split: str, name: str) -> list[float]:
    return [run["final"][split][name] for run in runs]


def _levels(outcomes: Mapping[str, Sequence[Outcome]], best: str | None) -> list[float]:
    """Levels of `good`: 25 %, 50 %, 75 % and 100 % of the way from the base to the best baseline."""
    if best is None or "base" not in outcomes:
        return []
    low = fmean(_final(outcomes["base"], "held_out", "good"))
    high = fmean(_final(outcomes[best], "held_out", "good"))
    return [low + (high - low) * fraction for fraction in (0.25, 0.5, 0.75, 1.0)]
