"""What is compared: the budget, the methods as pipelines, their knobs, and the cells of each part.

The budget of a run is 9,600 rollouts and 3,200 demonstrations that losses are computed on (a demonstration
counts each time), whatever the number of stages; a method that uses no rollouts gets as many demonstrations
instead. Tokens and seconds differ with what a method writes and computes: they are counted and reported.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from uniapl.config.resolve import merge
from uniapl.demo.recipe import RECIPE

Value = float | int | str
Split = Literal["validation", "test"]

STEPS = 100
"""Of a stage with rollouts, each with the batch of the demo's recipe."""
ROLLOUTS = STEPS * RECIPE["batching"]["prompts_per_step"] * RECIPE["rollout"]["num_generations"]
DEMONSTRATIONS = STEPS * RECIPE["batching"]["demonstrations_per_step"]

_SFT_FIRST = {"method": "sft", "max_steps": 25, "batching": {"demonstrations_per_step": 128}}

PIPELINES: dict[str, tuple[dict[str, Any], ...]] = {
    "sft": ({"method": "sft", "max_steps": 100, "batching": {"demonstrations_per_step": 128}},),
    "grpo": ({"method": "grpo"},),
    "sft -> grpo": (_SFT_FIRST, {"method": "grpo"}),
    "chord-mu": ({"method": "chord-mu", "objective": {"mu_decay_steps": STEPS}},),
    "chord-phi": ({"method": "chord-phi"},),
    "a-sft": ({"method": "a-sft"},),
    "a-grpo": ({"method": "a-grpo"},),
    "sft -> a-grpo": (_SFT_FIRST, {"method": "a-grpo"}),
    "a-sft -> a-grpo": (
        {"method": "a-sft", "max_steps": 50, "batching": {"demonstrations_per_step": 64}},
        {"method": "a-grpo", "max_steps": 50},
    ),
    "gad": ({"method": "gad"},),
    "uniapl": ({"method": "uniapl"},),
}
"""Stages of each method; what a stage does not say is the recipe's, with `STEPS` steps."""

BASELINES = ("sft", "grpo", "sft -> grpo", "chord-mu", "chord-phi")
"""What exists elsewhere, without an adversary and with rewards or demonstrations."""

LEARNING_RATES = (2.5e-4, 5e-4, 1e-3)
"""First round of the search, for every method; the best one at an edge brings in the next one beyond."""

KNOBS: dict[str, tuple[str, tuple[Value, ...]]] = {
    "sft": ("batching.demonstrations_per_step", (128, 64, 32)),
    "grpo": ("objective.beta", (0.0, 0.02, 0.1)),
    "sft -> grpo": ("objective.beta", (0.0, 0.02, 0.1)),
    "chord-mu": ("objective.mu_decay_steps", (100, 50, 25)),
    "chord-phi": ("objective.mu_valley", (0.1, 0.3, 0.03)),
    "a-sft": ("objective.lambda_adv", (2.0, 1.0, 4.0)),
    "a-grpo": ("objective.lambda_adv", (2.0, 1.0, 4.0)),
    "sft -> a-grpo": ("objective.lambda_adv", (2.0, 1.0, 4.0)),
    "a-sft -> a-grpo": ("objective.lambda_adv", (2.0, 1.0, 4.0)),
    "gad": ("objective.adversarial_credit", ("standardized", "win_probability", "logit")),
    "uniapl": ("objective.beta", (0.1, 0.02, 0.5)),
}
"""Second round of the search: each method's own knob, its usual value first."""

FRONTS: dict[str, tuple[str, tuple[Value, ...]]] = {
    "grpo": ("objective.beta", (0.0, 0.02, 0.1, 0.5)),
    "sft -> grpo": ("objective.beta", (0.0, 0.02, 0.1, 0.5)),
    "chord-mu": ("objective.mu_valley", (0.02, 0.05, 0.2, 0.5)),
    "uniapl": ("objective.beta", (0.0, 0.02, 0.1, 0.5)),
}
"""The knob along which each method trades `good` against closeness to the expert. For uniapl that is the
KL, as for the pipeline that it replaces; the sweep of lambda_adv is among the variants."""

SETTINGS: dict[str, dict[str, Value]] = {
    method: {"optim.learning_rate": rate, **own}
    for method, rate, own in (
        ("sft", 2.5e-4, {"batching.demonstrations_per_step": 128}),
        ("grpo", 1e-3, {"objective.beta": 0.02}),
        ("sft -> grpo", 1e-3, {"objective.beta": 0.02}),
        ("chord-mu", 1e-3, {"objective.mu_decay_steps": 25, "objective.mu_valley": 0.05}),
        ("chord-phi", 5e-4, {"objective.mu_valley": 0.3}),
        ("a-sft", 5e-4, {"objective.lambda_adv": 2.0}),
        ("a-grpo", 2.5e-4, {"objective.lambda_adv": 2.0}),
        ("sft -> a-grpo", 1e-3, {"objective.lambda_adv": 1.0}),
        ("a-sft -> a-grpo", 2.5e-4, {"objective.lambda_adv": 2.0}),
        ("gad", 5e-4, {"objective.adversarial_credit": "standardized"}),
        ("uniapl", 5e-4, {"objective.beta": 0.1}),
    )
}
"""What the search found (docs/log.md)."""

ABLATIONS: dict[str, dict[str, Value]] = {
    "lambda_adv = 0: no adversary": {"objective.lambda_adv": 0.0},
    "frozen after its warm-up": {
        "discriminator.freeze_after_steps": 10,
        "discriminator.updates_per_step": 10,
    },
    "in the reward": {"objective.adversarial_placement": "reward"},
    "64 demonstrations": {"demonstrations": 64},
    "1,024 demonstrations": {"demonstrations": 1024},
    "lambda_adv = 8": {"objective.lambda_adv": 8.0},
}
"""Changes to `uniapl`, by name."""

SEARCH_SEED = 1000
"""Seeds of the search begin here, those of the other parts at 0: no prompt and no draw is shared."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run.

    Example:
        Cell(method="grpo", settings={"optim.learning_rate": 5e-4, "objective.beta": 0.02}, seed=3)
    """

    method: str
    """A key of `PIPELINES`."""
    settings: Mapping[str, Value]
    """Dotted keys of the configuration, for every stage; and `demonstrations`, the task's number of them."""
    seed: int
    """Of the task's prompts and texts, and of training."""

    @property
    def name(self) -> str:
        """A file name that nothing else has."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        method = self.method.replace(" -> ", "+")
        return f"{method}-{self.seed}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"

    @property
    def split(self) -> Split:
        """What its prompts may be used for."""
        return "validation" if self.seed >= SEARCH_SEED else "test"

    @property
    def recipe(self) -> dict[str, Any]:
        """What the run is: the budget's shape, the pipeline's stages, the settings."""
        settings: dict[str, Any] = {}
        for key, value in self.settings.items():
            if key != "demonstrations":
                section, name = key.split(".")
                settings.setdefault(section, {})[name] = value
        # A constant mu has two ends.
        if self.method == "chord-phi":
            settings["objective"]["mu_peak"] = settings["objective"]["mu_valley"]
        common = merge(RECIPE, {"seed": self.seed, "max_steps": STEPS})
        first, *others = PIPELINES[self.method]
        if not others:
            return merge(merge(common, first), settings)
        stages = [{"max_steps": STEPS, **stage} for stage in (first, *others)]
        return merge(common, settings) | {"stages": stages}


def search_cells(method: str, rates: Sequence[float], values: Sequence[Value] | None = None) -> list[Cell]:
    """Cells of the search: every learning rate with every value of the method's knob, or its usual one."""
    knob, usual = KNOBS[method]
    return [
        Cell(method=method, settings={"optim.learning_rate": rate, knob: value}, seed=SEARCH_SEED)
        for rate in rates
        for value in values or usual[:1]
    ]


def table_cells(methods: Sequence[str], seeds: int) -> list[Cell]:
    """Every method with its settings, seed by seed."""
    return [
        Cell(method=method, settings=SETTINGS[method], seed=seed)
        for seed in range(seeds)
        for method in methods
    ]


def front_cells(methods: Sequence[str], seeds: int) -> list[Cell]:
    """Every method that has a front, along its knob."""
    return [cell for seed in range(seeds) for method in methods for cell in front_of(method, seed)]


def front_of(method: str, seed: int) -> list[Cell]:
    """The cells of one front; none for a method without."""
    if method not in FRONTS:
        return []
    knob, values = FRONTS[method]
    return [Cell(method=method, settings={**SETTINGS[method], knob: value}, seed=seed) for value in values]


def ablation_cells(seeds: int) -> dict[str, list[Cell]]:
    """Every variant of uniapl, by name."""
    return {
        name: [
            Cell(method="uniapl", settings={**SETTINGS["uniapl"], **changes}, seed=seed)
            for seed in range(seeds)
        ]
        for name, changes in ABLATIONS.items()
    }
