"""Which charts a report has: descriptions with their data, which page and figures draw alike.

A chart is a mapping that goes to the page as it is:
    {"kind": "lines" | "stack", "title", "x": label of the axis, "log": whether a logarithm makes sense,
     "smooth": whether smoothing does, "note", "lines": [{"label", "x", "y", "low"?, "high"?}, ...]}
Histograms are {"kind": "histogram", "title", "x", "edges", "groups": [{"label", "shares"}], "note"}.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from uniapl.report.analysis import mean, mean_interval, rounded
from uniapl.report.reading import RunData

Chart = dict[str, Any]

MOST_POINTS = 2000
"""Points of a line: more cannot be told apart on a screen, and would only make the page slow."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A chart over steps, before any run's data."""

    title: str
    series: Mapping[str, str]
    """Metric -> what its line is called."""
    kind: str = "lines"
    spread: str | None = None
    """The metric that is drawn as a band, plus and minus, around a chart's only line."""
    log: bool = False
    smooth: bool = True
    """Not where the values are settings, which may jump and have no noise."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one recipe with different seeds, or one run."""

    label: str
    runs: list[RunData] = field(default_factory=list)


FORCES = {"sft": "demonstrations", "rl": "rewards", "adv": "adversary"}
COMPONENTS = {**FORCES, "kl": "KL"}


def themes(runs: Sequence[RunData]) -> Iterator[tuple[str, list[Plan]]]:
    """Theme after theme, each with the charts that a run may have."""
    prefixes = ("rewards/", "eval/", "time/")
    found = {key: None for run in runs for prefix in prefixes for key in run.keys(prefix)}
    means = {key: key.split("/", 1)[1] for key in found if key[:8] == "rewards/" and key.endswith("/mean")}
    functions = {key: name.removesuffix("/mean").rsplit(":", 1)[-1] for key, name in means.items()}
    trouble = {
        key: key.split("/")[-2].rsplit(":", 1)[-1] + ", " + key.rsplit("/", 1)[-1].replace("_rate", "")
        for key in found
        if key.endswith(("/error_rate", "/timeout_rate", "/none_rate"))
        and any(value for run in runs for value in run.series(key))
    }
    phases = {key: phase for key in found if (phase := phase_of(key))}
    yield (
        "Reward",
        [
            Plan(
                title="Reward",
                series={"reward": "mean"},
                spread="reward_std",
                note="Band: plus and minus the standard deviation within a prompt's answers.",
            ),
            *([Plan(title="Reward functions", series=functions)] if len(functions) > 1 else []),
            Plan(
                title="Groups of answers",
                series={
                    "groups/mixed": "rewards differ",
                    "groups/all_good": "all the best",
                    "groups/all_bad": "all the worst",
                },
                note="Only groups whose rewards differ teach by reward.",
            ),
            Plan(title="Answers without a reward", series=trouble),
        ],
    )
    yield (
        "Held-out",
        [
            Plan(title=key.removeprefix("eval/"), series={key: "score"})
            for key in found
            if key.startswith("eval/")
        ],
    )
    yield "Losses", list(_losses())
    yield "Adversary", list(_adversary())
    yield "Policy", list(_policy())
    yield (
        "Cost",
        [
            Plan(
                title="Tokens in each loss",
                series={
                    "tokens/sft": "demonstrations",
                    "tokens/rollout": "answers",
                    "tokens/rl": "with a reward",
                    "tokens/adv": "judged",
                },
            ),
            Plan(title="Seconds per step, by phase", series=phases, kind="stack"),
        ],
    )


def phase_of(key: str) -> str | None:
    """The phase of a step whose seconds a metric holds; those of single reward functions are part of one."""
    is_phase = key.startswith("time/") and not key.startswith("time/rewards/")
    return key.removeprefix("time/") if is_phase else None


def _losses() -> Iterator[Plan]:
    yield Plan(
        title="Loss of each force, per token, unweighted",
        series={f"loss/{key}": label for key, label in COMPONENTS.items()},
    )
    yield Plan(title="Loss", series={"loss": "weighted sum"})
    yield Plan(title="Expert's answers, nats per token", series={"sft/nll": "nll"}, log=True)
    weights = {"weight/mu": "mu, demonstrations", "weight/lambda_adv": "lambda, adversary"}
    yield Plan(title="Weights", series=weights, smooth=False)
    yield Plan(title="Learning rate", series={"learning_rate": "policy"}, log=True, smooth=False)


def _adversary() -> Iterator[Plan]:
    yield Plan(
        title="Win rate",
        series={"discriminator/win_rate": "all answers", "discriminator/pair_win_rate": "beside an expert's"},
        note="How often an answer passes for the expert's; at 0.5 the two cannot be told apart.",
    )
    yield Plan(
        title="Discriminator's accuracy",
        series={
            "discriminator/accuracy": "all prompts",
            "discriminator/held_out_accuracy": "prompts it never learns from",
        },
    )
    yield Plan(
        title="Margin, expert's logit minus policy's",
        series={
            "discriminator/margin": "all prompts",
            "discriminator/held_out_margin": "prompts it never learns from",
        },
    )
    yield Plan(
        title="Expert gap",
        series={"discriminator/expert_gap": "all answers", "constraint/expert_gap": "beside an expert's"},
    )
    yield Plan(title="Constraint's violation", series={"constraint/violation": "gap minus what is allowed"})
    yield Plan(
        title="Multiplier", series={"constraint/multiplier": "lambda, learned"}, log=True, smooth=False
    )
    yield Plan(title="Discriminator's loss", series={"discriminator/loss": "loss"}, log=True)


def _policy() -> Iterator[Plan]:
    yield Plan(
        title="Length of answers, tokens",
        series={"completions/mean_length": "policy", "expert/mean_length": "expert"},
    )
    yield Plan(title="Answers cut at the limit", series={"completions/clipped_ratio": "share"})
    yield Plan(title="KL to the reference", series={"kl": "nats per token"}, log=True)
    yield Plan(title="Entropy", series={"entropy": "nats per token"})
    yield Plan(title="Gradient norm", series={"grad_norm": "before clipping"}, log=True)
    yield Plan(
        title="Gradient norm of each force",
        series={f"grad_norm/{key}": label for key, label in COMPONENTS.items()},
        log=True,
    )
    yield Plan(
        title="Cosine between the forces' gradients",
        series={
            f"grad_cosine/{a}_{b}": f"{FORCES[a]}, {FORCES[b]}"
            for a, b in (("sft", "rl"), ("sft", "adv"), ("rl", "adv"))
        },
    )
    yield Plan(
        title="Sampler against trainer, difference of log-probs",
        series={
            "sampling/sampling_logp_difference/mean": "mean",
            "sampling/sampling_logp_difference/max": "largest",
        },
        log=True,
    )
    yield Plan(
        title="Clipped tokens",
        series={"clip_ratio/low_mean": "at the lower bound", "clip_ratio/high_mean": "at the upper bound"},
    )


def curves(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Theme after theme, the charts over steps: a line per metric, or of several recipes a line for each."""
    groups = grouped(runs)
    result: list[dict[str, Any]] = []
    for title, plans in themes(runs):
        charts = [
            chart
            for plan in plans
            for chart in (_of_one(plan, groups[0]) if len(groups) == 1 else _of_several(plan, groups))
            if chart["lines"]
        ]
        if charts:
            result.append({"title": title, "charts": charts})
    return result


def cost_curves(runs: Sequence[RunData]) -> list[Chart]:
    """Reward against tokens and against time."""
    groups = grouped(runs)
    costs = {"num_tokens": "tokens learnt from", "seconds": "seconds"}
    charts: list[Chart] = []
    for key, label in costs.items():
        lines = [line(group, "reward", group.label, x=key) for group in groups]
        known = [found for found in lines if found is not None]
        if known:
            charts.append(_chart("lines", f"Reward against {label}", known, x=label, smooth=True))
    return charts


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """Runs whose configurations differ in seed and place alone, together; in the order they were given."""
    names = labels(runs)
    groups: dict[str, Group] = {}
    members: dict[str, list[str]] = {}
    for run, label in zip(runs, names, strict=True):
        recipe = repr({k: v for k, v in run.config.items() if k not in ("seed", "output_dir")})
        group = groups.setdefault(recipe, Group(label=label))
        group.runs.append(run)
        members.setdefault(recipe, []).append(label)
    return [
        Group(label=_common(members[recipe]), runs=group.runs) if len(group.runs) > 1 else group
        for recipe, group in groups.items()
    ]


def labels(runs: Sequence[RunData]) -> list[str]:
    """The directories' names, with as much of the path before them as tells them apart."""
    paths = [run.directory.resolve() for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def line(group: Group, key: str, label: str, *, x: str = "step", spread: str | None = None) -> Chart | None:
    """One metric of a group: its values, or the means of several runs with intervals; None without any."""
    columns: dict[int, list[tuple[float, float, float | None]]] = {}
    for run in group.runs:
        spreads = run.series(spread) if spread else [None] * len(run.metrics)
        for step, place, value, width in zip(run.steps, run.series(x), run.series(key), spreads, strict=True):
            if place is not None and value is not None:
                columns.setdefault(step, []).append((float(place), float(value), width))
    if not columns:
        return None
    points: list[tuple[float, ...]] = []
    for step in sorted(columns):
        places, values, widths = zip(*columns[step], strict=True)
        centre, low, high = mean_interval(values)
        if len(group.runs) == 1 and widths[0] is not None:
            low, high = centre - widths[0], centre + widths[0]
        points.append((mean(places) or 0.0, centre, low, high))
    points = _thinned(points)
    found: Chart = {"label": label, "x": [_whole(p[0]) for p in points], "y": [rounded(p[1]) for p in points]}
    if any(p[2] != p[1] for p in points):
        found |= {"low": [rounded(p[2]) for p in points], "high": [rounded(p[3]) for p in points]}
    return found


def _thinned(points: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Means of so many neighbours as leave no more than `MOST_POINTS`."""
    size = -(-len(points) // MOST_POINTS)
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]


def _of_one(plan: Plan, group: Group) -> Iterator[Chart]:
    spread = plan.spread if len(group.runs) == 1 else None
    lines = [line(group, key, label, spread=spread) for key, label in plan.series.items()]
    note = plan.note if len(group.runs) == 1 or not plan.spread else ""
    # A term that is switched off has zeros everywhere: a line for it says nothing.
    known = [found for found in lines if found is not None and (len(plan.series) == 1 or any(found["y"]))]
    known = _aligned(known) if plan.kind == "stack" else known
    several = f"Mean of {len(group.runs)} seeds with its 95 % interval." if len(group.runs) > 1 else ""
    said = f"{note} {several}".strip()
    yield _chart(plan.kind, plan.title, known, log=plan.log, smooth=plan.smooth, note=said)


def _aligned(lines: list[Chart]) -> list[Chart]:
    """Lines over the same places: a phase that a step did not have took no time in it."""
    places = sorted({x for found in lines for x in found["x"]})
    values = [dict(zip(found["x"], found["y"], strict=True)) for found in lines]
    return [
        {"label": found["label"], "x": places, "y": [known.get(x, 0) for x in places]}
        for found, known in zip(lines, values, strict=True)
    ]


def _of_several(plan: Plan, groups: Sequence[Group]) -> Iterator[Chart]:
    if plan.kind == "stack":
        plan = Plan(title="Seconds per step", series={"step_time": "all phases"})
    for key, label in plan.series.items():
        lines = [line(group, key, group.label) for group in groups]
        known = [found for found in lines if found is not None]
        if not any(value for found in known for value in found["y"]):
            continue
        title = plan.title if len(plan.series) == 1 else f"{plan.title}: {label}"
        yield _chart("lines", title, known, log=plan.log, smooth=plan.smooth)


def _chart(
    kind: str,
    title: str,
    lines: list[Chart],
    *,
    x: str = "step",
    log: bool = False,
    smooth: bool = False,
    note: str = "",
) -> Chart:
    log = log and all(value > 0 for found in lines for value in found["y"])
    return {"kind": kind, "title": title, "x": x, "lines": lines, "log": log, "smooth": smooth, "note": note}


def _common(labels: Sequence[str]) -> str:
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    shared = "".join(letters[0] for letters in alike).rstrip("-_./ 0123456789").removesuffix("seed")
    return f"{shared.rstrip('-_./ ') or labels[0]} ({len(labels)} seeds)"


def _whole(value: float) -> float | int | None:
    return int(value) if value.is_integer() else rounded(value)
