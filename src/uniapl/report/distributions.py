"""The analyses of what a run sampled: lengths beside the expert's, diversity, win rates."""

import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from uniapl.report.analysis import (
    bin_edges,
    distinct,
    distinct_share,
    ends,
    histogram,
    kolmogorov_smirnov,
    number,
    quantile,
    rounded,
    wasserstein,
)
from uniapl.report.charts import Chart
from uniapl.report.reading import Record, RunData

BINS = 24


def distributions(run: RunData) -> dict[str, Any]:
    """Charts, and the table that goes with the lengths; empty for a run without completions.

    Returns:
        "charts", and "lengths" with a row per sample and a row per pair of samples.
    """
    steps = [list(records) for _, records in groupby(run.completions, key=lambda record: record["step"])]
    if not steps:
        return {"charts": [], "lengths": None}
    first, last = ([record for records in part for record in records] for part in ends(steps))
    names = ("policy, first tenth", "policy, last tenth")
    lengths = _lengths(first, last, names)
    note = (
        "Of prompts that have a demonstration, whose lengths are the expert's." if len(lengths) == 3 else ""
    )
    charts = [_histogram("Length of answers", "tokens", lengths, note)]
    wins = {name: _values(part, "win_rate") for name, part in zip(names, (first, last), strict=True)}
    if all(wins.values()):
        note = "At 0.5 an answer cannot be told from the expert's."
        charts.append(_histogram("Win rate of answers", "win rate", wins, note))
    return {"charts": [*charts, _diversity(steps)], "lengths": _table(lengths)}


def _lengths(first: list[Record], last: list[Record], names: Sequence[str]) -> dict[str, list[float]]:
    """Per sample; where there are demonstrations, of prompts that have one alone: only those compare."""
    demonstrated = [[r for r in part if r.get("demonstration_tokens")] for part in (first, last)]
    if not all(demonstrated):
        return dict(zip(names, (_values(part, "tokens") for part in (first, last)), strict=True))
    # A prompt's demonstration is one answer, however often the prompt was drawn.
    both = {record["row"]: record["demonstration_tokens"] for part in demonstrated for record in part}
    samples = dict(zip(names, (_values(part, "tokens") for part in demonstrated), strict=True))
    return samples | {"expert": list(both.values())}


def _values(records: Sequence[Record], key: str) -> list[float]:
    found = (number(answer.get(key)) for record in records for answer in record["completions"])
    return [float(value) for value in found if value is not None]


def _histogram(title: str, x: str, samples: dict[str, list[float]], note: str = "") -> Chart:
    edges = bin_edges(samples.values(), BINS)
    groups = [
        {"label": label, "shares": [rounded(share) for share in histogram(values, edges)]}
        for label, values in samples.items()
    ]
    return {
        "kind": "histogram",
        "title": title,
        "x": x,
        "edges": [rounded(edge) for edge in edges],
        "groups": groups,
        "note": note,
    }


def _table(samples: dict[str, list[float]]) -> dict[str, Any]:
    names = list(samples)
    return {
        "samples": [
            {
                "label": label,
                "count": len(values),
                "mean": statistics.fmean(values),
                **{f"q{share}": quantile(values, share / 100) for share in (10, 50, 90)},
            }
            for label, values in samples.items()
        ],
        "distances": [
            {
                "label": f"{a} against {b}",
                "wasserstein": wasserstein(samples[a], samples[b]),
                "kolmogorov_smirnov": kolmogorov_smirnov(samples[a], samples[b]),
            }
            for position, a in enumerate(names)
            for b in names[position + 1 :]
        ],
    }


def _diversity(steps: Sequence[Sequence[Record]]) -> Chart:
    x = [records[0]["step"] for records in steps]
    texts = [[[answer["text"] for answer in r["completions"]] for r in records] for records in steps]
    columns = {
        f"distinct-{n}": [distinct([text for group in groups for text in group], n) for groups in texts]
        for n in (1, 2, 3)
    }
    columns["different answers to a prompt"] = [
        statistics.fmean(distinct_share(group) for group in groups) for groups in texts
    ]
    lines = [
        {"label": label, "x": x, "y": [rounded(value) for value in values]}
        for label, values in columns.items()
    ]
    return {
        "kind": "lines",
        "title": "Diversity of a step's answers",
        "x": "step",
        "lines": lines,
        "log": False,
        "smooth": True,
        "note": "distinct-n: the share of different ones among all n-grams. Longer answers repeat more.",
    }
