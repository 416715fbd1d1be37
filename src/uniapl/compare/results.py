"""The results of a comparison, computed from the outcomes of its cells, as results.json holds them."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, TypedDict

from uniapl.compare import verdict
from uniapl.compare.budget import budget_of
from uniapl.compare.measures import Judge, closeness, judged, scores
from uniapl.compare.plan import BASE, Variant
from uniapl.compare.statistics import paired_difference, score_at_equal_closeness
from uniapl.config.resolve import resolve, stages_of
from uniapl.errors import UniAPLError
from uniapl.intervals import student_interval

Outcome = Mapping[str, Any]
"""The result of :func:`uniapl.compare.cell.run_cell`."""

FORMAT = 3
"""Version of results.json."""
COMPARED = ("score", "expert_nll", "length_distance", "judge")
"""Measures whose difference from the best method is reported."""


class Point(TypedDict):
    """A point of a run's curve."""

    step: int
    rollout_tokens: float
    trained_tokens: float
    entropy: float | None
    """The step's own estimate; steps without rollouts have none."""
    values: dict[str, float]


class Run(TypedDict):
    """What an outcome is reduced to: numbers, without any text of the data or of a model."""

    seed: int
    settings: dict[str, Any]
    planned: dict[str, int]
    cost: dict[str, float]
    warnings: dict[str, int]
    values: dict[str, float]
    """`score`, the main score, and the measures."""
    scores: dict[str, dict[str, dict[str, Any]]]
    """Suite -> score -> mean and standard error over prompts."""
    curve: list[Point]


def measure(outcome: Outcome, main: tuple[str, str], judge: Judge | None = None) -> Run:
    """The numbers of a cell.

    Raises:
        UniAPLError: Every call of the function that gives the main score failed.
    """
    final, cell = outcome["final"], outcome["cell"]
    return Run(
        seed=cell["seed"],
        settings=dict(cell["settings"]),
        planned=planned(cell["recipe"]),
        cost=outcome["cost"],
        warnings=outcome.get("warnings", {}),  # cells of earlier versions have none
        values=_values_of(final, final, main, judge),
        scores=scores(final),
        curve=[
            Point(
                step=point["step"],
                rollout_tokens=point["rollout_tokens"],
                trained_tokens=point["trained_tokens"],
                entropy=point["metrics"].get("rollout/entropy_estimate"),
                values=_values_of(point["sample"], final, main, judge),
            )
            for point in outcome["curve"]
        ],
    )


def _values_of(sample: Any, final: Any, main: tuple[str, str], judge: Judge | None) -> dict[str, float]:
    """The numbers of a sample; `final`, of the same model's end, has the expert's texts."""
    values = closeness(sample)
    score = scores(sample)[main[0]].get(main[1], {}).get("mean")
    if score is None:
        raise UniAPLError(f"suite '{main[0]}': no completion could be scored by '{main[1]}'")
    return values | {"score": score} | ({} if judge is None else judged(sample, final, judge))


def summarize(
    runs: Mapping[str, Sequence[Run]], variants: Sequence[Variant], *, main: tuple[str, str]
) -> dict[str, Any]:
    """Tables, curves, fronts and verdict.

    The best method is chosen by these same results, so chance favours it.

    Args:
        runs: Label of a method (and `BASE`) -> one run per seed, in the same order of seeds.
        main: Suite and score by which the methods are compared.
    """
    trained = [label for label in runs if label != BASE]
    best = max(trained, key=lambda label: _mean(runs[label], "score"))
    methods: dict[str, Any] = {}
    for label, found in runs.items():
        methods[label] = {
            **found[0]["planned"],
            "settings": found[0]["settings"],
            "scores": _scores(found),
            "measures": _measures(found),
            "prompt_error": _prompt_error(found, main),
            "cost": {name: fmean(run["cost"][name] for run in found) for name in found[0]["cost"]},
            "warnings": _warnings(found),
            "minus_best": _differences(found, runs[best]),
            "minus_base": _differences(found, runs[BASE]),
        }
    summary: dict[str, Any] = {
        "format": FORMAT,
        "main": {"suite": main[0], "score": main[1]},
        "seeds": [run["seed"] for run in runs[BASE]],
        "best": best,
        "methods": methods,
        "curves": _curves(runs),
        "fronts": _fronts(variants, runs),
    }
    recommended = verdict.recommended(methods, best)
    if recommended in methods:
        compared = {
            label: _differences(runs[label], runs[recommended]) for label in trained if label != recommended
        }
        summary["recommended"] = {"method": recommended, "others_minus_this": compared}
    return {**summary, "verdict": verdict.sentences(summary), "runs": runs}


def _warnings(found: Sequence[Run]) -> dict[str, list[int]]:
    """Health rule -> the first step in which it fired, in each run in which it did."""
    kept = [run["warnings"] for run in found]
    rules = sorted({rule for warnings in kept for rule in warnings})
    return {rule: [warnings[rule] for warnings in kept if rule in warnings] for rule in rules}


def planned(recipe: Mapping[str, Any]) -> dict[str, int]:
    """Steps, rollouts and demonstrations of a cell's recipe."""
    if not recipe:
        return {"steps": 0, "rollouts": 0, "demonstrations": 0}
    stages = [stage.config for stage in stages_of(resolve(dict(recipe)))]
    budget = budget_of(stages)
    return {
        "steps": sum(stage.max_steps for stage in stages),
        "rollouts": budget.rollouts,
        "demonstrations": budget.demonstrations,
    }


def _measures(found: Sequence[Run]) -> dict[str, Any]:
    """The measures that every seed has: completions of one word have no pairs of words."""
    names = [name for name in found[0]["values"] if all(name in one["values"] for one in found)]
    return {name: student_interval(_values(found, name)) for name in names}


def _values(found: Sequence[Run], name: str) -> list[float]:
    return [one["values"][name] for one in found]


def _mean(found: Sequence[Run], name: str) -> float:
    return fmean(_values(found, name))


def _scores(found: Sequence[Run]) -> dict[str, Any]:
    """Suite -> score -> the mean with its interval over seeds, and the mean standard error over prompts."""
    return {
        suite: {
            name: {
                **student_interval([one["scores"][suite][name]["mean"] for one in found]),
                **_errors(found, suite, name),
            }
            for name in named
            if all(name in one["scores"][suite] for one in found)
        }
        for suite, named in found[0]["scores"].items()
    }


def _errors(found: Sequence[Run], suite: str, name: str) -> dict[str, float | None]:
    errors = [error for one in found if (error := one["scores"][suite][name]["prompt_error"]) is not None]
    return {"prompt_error": fmean(errors) if errors else None}


def _prompt_error(found: Sequence[Run], main: tuple[str, str]) -> float | None:
    return _errors(found, *main)["prompt_error"]


def _differences(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    return {
        name: paired_difference(_values(ours, name), _values(theirs, name))
        for name in COMPARED
        if all(name in one["values"] for one in (*ours, *theirs))
    }


def _curves(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """The means over seeds at each point of the curves, from the model before training on."""
    curves: dict[str, dict[str, Any]] = {}
    base = runs[BASE]
    shown = [name for name in ("score", "judge", "on_topic", "tokens") if name in base[0]["values"]]
    for label, found in runs.items():
        # Early stopping may have ended a run before the others.
        steps = [*zip(*(run["curve"] for run in found), strict=False)]
        if not steps:
            continue
        curve: dict[str, Any] = {"step": [0.0], "rollout_tokens": [0.0], "trained_tokens": [0.0]}
        curve |= {name: [_mean(base, name)] for name in shown} | {"entropy": [None]}
        for points in steps:
            for name in ("step", "rollout_tokens", "trained_tokens"):
                curve[name].append(fmean(point[name] for point in points))
            for name in shown:
                curve[name].append(fmean(point["values"][name] for point in points))
            entropies = [point["entropy"] for point in points]
            known = [entropy for entropy in entropies if entropy is not None]
            curve["entropy"].append(fmean(known) if len(known) == len(entropies) else None)
        curves[label] = curve
    return curves


def _fronts(variants: Sequence[Variant], runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Methods with a swept setting: their models by its value, and their score at equal closeness.

    The front of a method and a seed consists of its models and the base. The bounds on the distance are the
    range of all fronts' models.
    """
    swept: dict[str, list[Variant]] = {}
    for variant in variants:
        if variant.swept is not None:
            swept.setdefault(f"{variant.pipeline}, {variant.swept}", []).append(variant)
    points = {
        name: [
            [(one["values"]["score"], one["values"]["expert_nll"]) for one in models]
            for models in zip(runs[BASE], *(runs[variant.label] for variant in found), strict=True)
        ]
        for name, found in swept.items()
    }
    distances = [distance for seeds in points.values() for front in seeds for _, distance in front]
    bounds = (min(distances), max(distances)) if distances else (0.0, 0.0)
    equal = {
        name: [score_at_equal_closeness(front, bounds) for front in seeds] for name, seeds in points.items()
    }
    best = max(equal, key=lambda name: fmean(equal[name]), default="")
    return {
        name: {
            "points": [
                {
                    "value": variant.settings[str(variant.swept)],
                    "label": variant.label,
                    **{
                        measure: student_interval(_values(runs[variant.label], measure))
                        for measure in ("score", "expert_nll")
                    },
                }
                for variant in found
            ],
            "score_at_equal_closeness": student_interval(equal[name]),
            "best_front": best,
            "minus_best_front": None if name == best else paired_difference(equal[name], equal[best]),
        }
        for name, found in swept.items()
    }
