"""From the outcomes of cells to the tables of a comparison: plain values, as results.json holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from uniapl.compare.plan import BASELINES, FRONTS
from uniapl.compare.statistics import (
    Point,
    bootstrap,
    cost_to_reach,
    distance_at_equal_good,
    good_at_equal_closeness,
    paired_difference,
)

Outcome = dict[str, Any]
"""What `uniapl.compare.cell.run_cell` returns."""

SPLITS = ("held_out", "held_out_combinations")
MEASURES = (
    "good", "passed", "fluency", "expert_nll", "length_distance", "place_habit", "reference_nll",
    "distinct", "distinct_2",
)  # fmt: skip
COSTS = ("rollout_tokens", "trained_tokens", "seconds")


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Every method's means, its difference to the best baseline, and its cost to reach levels of `good`.

    The best baseline is picked by these very figures: chance helps it, never us.

    Args:
        outcomes: Per method (and "base"), one outcome per seed, the seeds in the same order.
    """
    present = [name for name in BASELINES if name in outcomes]
    best = max(present, key=lambda name: fmean(_final(outcomes[name], "held_out", "good")), default=None)
    levels = _levels(outcomes, best)
    rows: dict[str, Any] = {}
    for method, runs in outcomes.items():
        row: dict[str, Any] = {
            split: {name: asdict(bootstrap(_final(runs, split, name))) for name in MEASURES}
            for split in SPLITS
        }
        row["cost"] = {name: fmean(run["cost"][name] for run in runs) for name in COSTS}
        if best is not None:
            row["minus_best_baseline"] = {
                split: asdict(
                    paired_difference(_final(runs, split, "good"), _final(outcomes[best], split, "good"))
                )
                for split in SPLITS
            }
        if method != "base":
            curve = mean_curve(runs, outcomes["base"])
            row["rollout_tokens_to_reach"] = {
                f"{level:.3f}": cost_to_reach(curve["rollout_tokens"], curve["good"], level)
                for level in levels
            }
        rows[method] = row
    return {"best_baseline": best, "levels": levels, "methods": rows}


def short_table(table: Mapping[str, Any]) -> list[list[str]]:
    """The header and a row of text per method: what fits a terminal and the README."""
    best = table["best_baseline"]
    rows = [
        [
            "method",
            "good",
            f"difference from {best}",
            "new combinations",
            "expert nll",
            "length distance",
            "tokens",
        ]
    ]
    for method, row in table["methods"].items():
        here, there = (row[split] for split in SPLITS)
        difference = row["minus_best_baseline"]["held_out"] if best and method != best else None
        rows.append(
            [
                method,
                f"{here['good']['mean']:.3f}",
                "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference) if difference else "",
                f"{there['good']['mean']:.3f}",
                f"{here['expert_nll']['mean']:.3f}",
                f"{here['length_distance']['mean']:.2f}",
                f"{row['cost']['rollout_tokens']:,.0f}",
            ]
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the header first, as a table for a document."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|---" * len(rows[0]) + "|", *body])


def mean_curve(runs: Sequence[Outcome], base: Sequence[Outcome]) -> dict[str, list[float]]:
    """The mean over seeds of `good` and of the cost at each point of the curve, from the base on."""
    curve: dict[str, list[float]] = {name: [0.0] for name in COSTS}
    curve["good"] = [fmean(_final(base, "held_out", "good"))]
    for points in zip(*(run["curve"] for run in runs), strict=True):
        for name in ("good", *COSTS):
            curve[name].append(fmean(point[name] for point in points))
    return curve


def fronts(
    outcomes: Mapping[str, Sequence[Sequence[Outcome]]], base: Sequence[Outcome], *, ours: str = "uniapl"
) -> dict[str, Any]:
    """How far our front lies above each other method's, on both splits, paired over seeds.

    Per seed a method's front is the set of its models along its knob, and the base. Two numbers compare
    fronts: `good` at equal closeness, averaged over bounds on the distance, and the distance at equal
    `good`, averaged over levels; the ranges are those of all methods' models.

    Args:
        outcomes: Per method, per seed, one outcome per value of the knob.
        base: The base's outcome per seed.
    """
    result: dict[str, Any] = {}
    for split in SPLITS:
        for distance in ("expert_nll", "length_distance"):
            points = {
                method: [
                    [_point(o, split, distance) for o in (*swept, start)]
                    for swept, start in zip(seeds, base, strict=True)
                ]
                for method, seeds in outcomes.items()
            }
            everything = [p for seeds in points.values() for front in seeds for p in front]
            distances, goods = [p.distance for p in everything], [p.good for p in everything]
            bounds, levels = (min(distances), max(distances)), (min(goods), max(goods))
            good = {m: [good_at_equal_closeness(f, bounds) for f in s] for m, s in points.items()}
            near = {m: [distance_at_equal_good(f, levels, bounds[1]) for f in s] for m, s in points.items()}
            best = {m: [max(p.good for p in f) for f in s] for m, s in points.items()}
            result[f"{split}/{distance}"] = {
                "bounds": bounds,
                "levels": levels,
                "methods": {
                    method: {
                        "good_at_equal_closeness": asdict(bootstrap(good[method])),
                        "distance_at_equal_good": asdict(bootstrap(near[method])),
                        "best_good": asdict(bootstrap(best[method])),
                        "ours_minus_this": {
                            "good_at_equal_closeness": asdict(paired_difference(good[ours], good[method])),
                            "distance_at_equal_good": asdict(paired_difference(near[ours], near[method])),
                            "best_good": asdict(paired_difference(best[ours], best[method])),
                        }
                        if ours in points and method != ours
                        else None,
                        "points": _mean_points(method, outcomes[method], split, distance),
                    }
                    for method in points
                },
            }
    return result


def ablations(variants: Mapping[str, Sequence[Outcome]], uniapl: Sequence[Outcome]) -> dict[str, Any]:
    """Every variant's means and its difference to uniapl as it is, on the same seeds."""
    return {
        name: {
            split: {
                measure: {
                    **asdict(bootstrap(_final(runs, split, measure))),
                    "difference": asdict(
                        paired_difference(_final(runs, split, measure), _final(uniapl, split, measure))
                    ),
                }
                for measure in ("good", "fluency", "expert_nll", "length_distance")
            }
            for split in SPLITS
        }
        for name, runs in variants.items()
    }


def _mean_points(
    method: str, seeds: Sequence[Sequence[Outcome]], split: str, distance: str
) -> list[dict[str, Any]]:
    knob, values = FRONTS[method]
    return [
        {
            "knob": knob,
            "value": value,
            "good": asdict(bootstrap([o["final"][split]["good"] for o in runs])),
            "distance": asdict(bootstrap([o["final"][split][distance] for o in runs])),
        }
        for value, runs in zip(values, zip(*seeds, strict=True), strict=True)
    ]


def _point(outcome: Outcome, split: str, distance: str) -> Point:
    return Point(good=outcome["final"][split]["good"], distance=outcome["final"][split][distance])


def _final(runs: Sequence[Outcome], split: str, name: str) -> list[float]:
    return [run["final"][split][name] for run in runs]


def _levels(outcomes: Mapping[str, Sequence[Outcome]], best: str | None) -> list[float]:
    """Of `good`: a quarter, a half, three quarters and all of the way from the base to the best baseline."""
    if best is None or "base" not in outcomes:
        return []
    low = fmean(_final(outcomes["base"], "held_out", "good"))
    high = fmean(_final(outcomes[best], "held_out", "good"))
    return [low + (high - low) * share for share in (0.25, 0.5, 0.75, 1.0)]
