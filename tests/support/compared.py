"""Made-up outcomes of cells, whose numbers are known."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from uniapl.compare import results
from uniapl.compare.plan import Variant, parse_methods

MAIN = ("held_out", "reward")


def sample(score: float, nll: float) -> dict[str, Any]:
    """A sample of two prompts, both with an expert's completion of 10 tokens."""
    return {
        "held_out": {
            "headline": "reward",
            "scores": {"reward": [[score + 0.1, 1], [score - 0.1, 1]]},
            "texts": ["a b", "c d"],
            "tokens": [10, 12],
            "truncated": [False, True],
            "base_logprobs": [-1.0, -1.0],
            "expert": {
                "index": [0, 1],
                "texts": ["a b", "c e"],
                "tokens": [10, 10],
                "logprobs": [-nll, -nll],
                "base_logprobs": [-1.5, -1.5],
            },
        }
    }


def outcome(method: str, seed: int, score: float, nll: float, *, flops: float = 1e15) -> dict[str, Any]:
    """The outcome of a cell with one point on its curve, halfway to its score from 0.2."""
    trained = method != "base"
    cost = {"rollout_tokens": 100, "trained_tokens": 200, "flops": flops, "seconds": 10.0}
    point = {key: value / 2 for key, value in cost.items()} | {
        "step": 5,
        "sample": sample((score + 0.2) / 2, nll),
        "metrics": {"rollout/entropy_estimate": 1 + seed / 10},
    }
    recipe = {"method": method.split("[")[0].split(" ->")[0], "max_steps": 10} if trained else {}
    return {
        "cell": {
            "method": method,
            "settings": {"a<b": seed} if trained else {},
            "seed": seed,
            "recipe": recipe,
        },
        "final": sample(score, nll),
        "curve": [point] if trained else [],
        "warnings": {"entropy_low": 40 + seed} if method == "grpo" and seed else {},
        "cost": cost if trained else dict.fromkeys(cost, 0),
        "wall": 20.0,
    }


def runs(**values: tuple[list[float], float]) -> dict[str, list[dict[str, Any]]]:
    """Label -> outcomes; a value is the scores by seed and the nll."""
    return {
        label: [outcome(label, seed, score, nll) for seed, score in enumerate(scores)]
        for label, (scores, nll) in values.items()
    }


def summary(found: Mapping[str, Sequence[Any]], variants: Sequence[Variant]) -> dict[str, Any]:
    """The summary of outcomes."""
    measured = {label: [results.measure(one, MAIN) for one in own] for label, own in found.items()}
    # As a later program reads them from results.json.
    return results.summarize(json.loads(json.dumps(measured)), variants, main=MAIN)


def results_of(**values: tuple[list[float], float]) -> dict[str, Any]:
    """The contents of results.json."""
    found = runs(**values)
    variants = parse_methods(",".join(label for label in found if label != "base"))
    return {
        "recipe": "recipe.yaml",
        "versions": {"uniapl": "0"},
        "budget": {"rollouts": 5120, "demonstrations": 1920},
        "temperature": 1.0,
        "judge": None,
        "search": {"sft": {"a<b": 2.0}},
        **summary(found, variants),
    }


MADE_UP: dict[str, tuple[list[float], float]] = {
    "base": ([0.2, 0.2, 0.2], 1.5),
    "sft": ([0.4, 0.42, 0.44], 1.2),
    "grpo": ([0.60, 0.64, 0.62], 1.8),
    "uniapl": ([0.61, 0.62, 0.60], 1.3),
}
