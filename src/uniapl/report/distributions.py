"""Analyses of the sampled completions: lengths compared with the demonstrations', diversity, win rates."""

import statistics
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Any

from uniapl.report.analysis import (
    distinct,
    distinct_fraction,
    ends,
    kolmogorov_smirnov,
    number,
    quantile,
    rounded,
    wasserstein,
)
from uniapl.report.charts import Chart, histogram_chart, line_chart
from uniapl.report.reading import Record, RunData
from uniapl.report.trajectories import written_text


def distributions(run: RunData) -> dict[str, Any]:
    """The analyses of a run's completions.

    Returns:
        "charts", and "lengths" with a row per sample and a row per pair of samples; without completions no
        charts and None.
    """
    steps = [list(records) for _, records in groupby(run.completions, key=lambda record: record["step"])]
    if not steps:
        return {"charts": [], "lengths": None}
    first, last = ([record for records in part for record in records] for part in ends(steps))
    count = len(ends(steps)[0])
    size = f"{count} steps" if count > 1 else "step"
    parts = {f"policy, first {size}": first, f"policy, last {size}": last}
    lengths, note = _lengths(parts)
    charts = [histogram_chart("Completion lengths", "tokens", lengths, note)]
    win_rates = {name: _values(part, "win_rate") for name, part in parts.items()}
    if all(win_rates.values()):
        note = "At 0.5 the discriminator cannot distinguish a completion from the demonstration."
        charts.append(histogram_chart("Win rates of completions", "win rate", win_rates, note))
    return {"charts": [*charts, _diversity(steps)], "lengths": _table(lengths)}


def _lengths(parts: dict[str, list[Record]]) -> tuple[dict[str, list[float]], str]:
    """Lengths by sample, and a note; with demonstrations, only prompts that have one are comparable."""
    demonstrated = {name: [r for r in part if r.get("demonstration_tokens")] for name, part in parts.items()}
    if not all(demonstrated.values()):
        return {name: _values(part, "tokens") for name, part in parts.items()}, ""
    # A demonstration counts once, even if its prompt was drawn several times.
    expert = {record["row"]: record["demonstration_tokens"] for p in demonstrated.values() for record in p}
    samples = {name: _values(part, "tokens") for name, part in demonstrated.items()}
    return samples | {"expert": list(expert.values())}, "Only prompts that have a demonstration."


def _values(records: Sequence[Record], key: str) -> list[float]:
    found = (number(completion.get(key)) for record in records for completion in record["completions"])
    return [float(value) for value in found if value is not None]


def _table(samples: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "samples": [
            {
                "label": label,
                "count": len(values),
                "mean": statistics.fmean(values),
                **{f"q{percent}": quantile(values, percent / 100) for percent in (10, 50, 90)},
            }
            for label, values in samples.items()
        ],
        "distances": [
            {
                "label": f"{a} and {b}",
                "wasserstein": wasserstein(samples[a], samples[b]),
                "kolmogorov_smirnov": kolmogorov_smirnov(samples[a], samples[b]),
            }
            for a, b in combinations(samples, 2)
        ],
    }


def _diversity(steps: Sequence[Sequence[Record]]) -> Chart:
    x = [records[0]["step"] for records in steps]
    texts = [
        [[written_text(completion) for completion in r["completions"]] for r in records] for records in steps
    ]
    columns = {
        f"distinct-{n}": [distinct([text for group in groups for text in group], n) for groups in texts]
        for n in (1, 2, 3)
    }
    columns["distinct completions of a prompt"] = [
        statistics.fmean(distinct_fraction(group) for group in groups) for groups in texts
    ]
    lines = [{"label": name, "x": x, "y": [rounded(y) for y in values]} for name, values in columns.items()]
    note = (
        "distinct-n: fraction of distinct n-grams among all n-grams. Longer completions repeat more of them."
    )
    return line_chart("Diversity of a step's completions", lines, smooth=True, note=note)
