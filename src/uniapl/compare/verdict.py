"""The verdict of a comparison in words, derived from its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.compare.plan import BASE
from uniapl.compare.statistics import distinguishable
from uniapl.report.analysis import decimal, interval_text

Methods = Mapping[str, Mapping[str, Any]]
OF_TRAINED_SCORE = (
    "Caution: this score is what the methods with rewards were trained on, so that it also rises where the "
    "reward is gamed. Name a metric that no method is trained on in evaluation.metrics."
)


def recommended(methods: Methods, best: str) -> str | None:
    """The method closest to the expert, by its nll, of those whose score is not measurably below the best.

    None if no method's score is measurably above that of the model before training.
    """
    candidates = [
        label
        for label in equals(methods, best)
        if distinguishable(above := methods[label]["minus_base"]["score"]) and (above["mean"] or 0) > 0
    ]
    return min(candidates, key=lambda label: _mean(methods[label], "expert_nll"), default=None)


def equals(methods: Methods, best: str) -> list[str]:
    """The best method and those whose score cannot be distinguished from its score."""
    others = [label for label in methods if label not in (BASE, best)]
    return [best, *(label for label in others if not distinguishable(methods[label]["minus_best"]["score"]))]


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """The findings, as sentences."""
    methods, best = summary["methods"], summary["best"]
    main, seeds = summary["main"], len(summary["seeds"])
    score = methods[best]["measures"]["score"]
    found = [f"{best} has the highest {main['score']} on {main['suite']}: {interval_text(score)}."]
    same = equals(methods, best)[1:]
    if same:
        shown = [f"{label} ({_difference(methods[label]['minus_best']['score'])})" for label in same]
        found.append(f"Not distinguishable from it with {seeds} seeds: {_listed(shown)}.")
    below = [label for label in methods if label not in (BASE, best, *same)]
    if below:
        shown = [f"{label} ({_difference(methods[label]['minus_best']['score'])})" for label in below]
        found.append(f"Measurably below it: {_listed(shown)}.")
    widths = [
        (d["high"] - d["low"]) / 2
        for label in methods
        if label not in (BASE, best) and (d := methods[label]["minus_best"]["score"])["low"] is not None
    ]
    if widths:
        middle = sorted(widths)[len(widths) // 2]
        found.append(
            f"Differences below about {decimal(middle)} (the median half-width of these intervals) "
            "cannot be seen with "
            f"{seeds} seeds. The highest value was chosen from these results, so chance favours it."
        )
    trained = [label for label in methods if label != BASE]
    closest = min(trained, key=lambda label: _mean(methods[label], "expert_nll"))
    found.append(
        f"{closest} is closest to the expert: {_nll(methods[closest])}, and completion lengths at a "
        "distance of "
        f"{decimal(_mean(methods[closest], 'length_distance'), 2)} tokens."
    )
    return [*found, *_recommendation(summary, closest)]


def _recommendation(summary: Mapping[str, Any], closest: str) -> list[str]:
    methods = summary["methods"]
    if "recommended" not in summary:
        return [
            "No method's score is measurably above that of the model before training, so that none "
            "is recommended: "
            "more seeds, more steps or other learning rates (--search) may show a difference."
        ]
    chosen = summary["recommended"]["method"]
    others = summary["recommended"]["others_minus_this"]
    row = methods[chosen]
    found = [
        f"Recommended: {chosen}. Of the methods that are not distinguishable from the best score it "
        "is the closest to "
        f"the expert ({_nll(row)}); it took {_cost(row)}."
    ]
    if chosen != closest and not distinguishable(others[closest]["expert_nll"]):
        found.append(f"Its distance from the expert cannot be distinguished from that of {closest}.")
    cheaper = [
        label
        for label in equals(methods, summary["best"])
        if label != chosen
        and methods[label]["cost"]["flops"] < 0.9 * row["cost"]["flops"]
        and not distinguishable(others[label]["expert_nll"])
    ]
    if cheaper:
        cheapest = min(cheaper, key=lambda label: methods[label]["cost"]["flops"])
        found.append(
            f"{cheapest} cannot be distinguished from it in score and in closeness, and is cheaper: "
            f"{_cost(methods[cheapest])}."
        )
    return found


def short_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """The main table as text for a terminal and a document: a header, and a row per method."""
    best = summary["best"]
    judge = any("judge" in row["measures"] for row in summary["methods"].values())
    header = ["method", summary["main"]["score"], f"difference from {best}", "prompt s.e.", "expert nll"]
    rows = [[*header, "length distance", *(["judge"] if judge else []), "tokens", "FLOPs", "seconds"]]
    for label, row in summary["methods"].items():
        measures, cost = row["measures"], row["cost"]
        rows.append(
            [
                label,
                decimal(measures["score"]["mean"]),
                "" if label == best else interval_text(row["minus_best"]["score"], "+"),
                "" if row["prompt_error"] is None else decimal(row["prompt_error"]),
                decimal(measures["expert_nll"]["mean"]),
                decimal(measures["length_distance"]["mean"], 2),
                *([decimal(measures["judge"]["mean"])] if judge else []),
                f"{cost['trained_tokens']:,.0f}",
                f"{cost['flops']:.2g}",
                f"{cost['seconds']:,.0f}",
            ]
        )
    return rows


def _mean(row: Mapping[str, Any], name: str) -> float:
    return row["measures"][name]["mean"]


def _nll(row: Mapping[str, Any]) -> str:
    return f"{decimal(_mean(row, 'expert_nll'))} nats per token of its held-out completions"


def _difference(value: Mapping[str, float | None]) -> str:
    return interval_text(value, "+")


def _cost(row: Mapping[str, Any]) -> str:
    cost = row["cost"]
    tokens, flops, seconds = cost["trained_tokens"], cost["flops"], cost["seconds"]
    return f"{tokens:,.0f} trained tokens, {flops:.2g} FLOPs and {seconds:,.0f} s"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
