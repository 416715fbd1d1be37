"""The plan of a comparison: budget, methods (methods.yaml), variants, and the cells of each part.

The budget of a run is 9,600 rollouts and 3,200 demonstrations in the losses (repetitions count), for any
number of stages; a method without rollouts gets as many demonstrations instead. Tokens and seconds depend on
the method: they are counted and reported.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import yaml

from uniapl.config.resolve import merge
from uniapl.demo.recipe import RECIPE
from uniapl.demo.rewards import REWARDS

Value = float | int | str

STEPS = 100
"""Steps of a stage with rollouts."""
ROLLOUTS = STEPS * RECIPE["batching"]["prompts_per_step"] * RECIPE["rollout"]["num_generations"]
DEMONSTRATIONS = 3200

_METHODS: dict[str, dict[str, Any]] = yaml.safe_load(
    (files("uniapl.compare") / "methods.yaml").read_text(encoding="utf-8")
)
PIPELINES: dict[str, Sequence[dict[str, Any]]] = {name: m["stages"] for name, m in _METHODS.items()}
KNOBS: dict[str, tuple[str, Sequence[Value]]] = {name: m["search"] for name, m in _METHODS.items()}
SETTINGS: dict[str, dict[str, Value]] = {name: m["settings"] for name, m in _METHODS.items()}
WRONG_REWARD: dict[str, dict[str, Value]] = {
    n: m["wrong_reward"] for n, m in _METHODS.items() if "wrong_reward" in m
}
FRONTS: dict[str, tuple[str, Sequence[Value]]] = {n: m["front"] for n, m in _METHODS.items() if "front" in m}

BASELINES = ("sft", "grpo", "sft -> grpo", "chord-mu", "chord-phi")
"""Methods of other libraries, without an adversary."""

LEARNING_RATES = (2.5e-4, 5e-4, 1e-3)
"""First round of the search; if the best value is at an end, the next one beyond it is tried too."""

HEAD: dict[str, Value] = {
    "discriminator.learning_rate": 1e-3,
    "discriminator.warmup_steps": 0,
    "discriminator.held_out_fraction": 0.1,
}

ABLATIONS: dict[str, dict[str, Value]] = {
    "lambda_adv = 0: the schedule alone": {"objective.lambda_adv": 0.0},
    "head": {"discriminator.kind": "head", **HEAD},
    "copy of the model": {"discriminator.kind": "bradley-terry", "discriminator.learning_rate": 1e-3},
    "added to the advantage": {"objective.adversarial_placement": "reward"},
    "c = 0.5": {"objective.lambda_adv": 0.5},
    "c = 2": {"objective.lambda_adv": 2.0},
    "beta = 0": {"objective.beta": 0.0},
    "64 demonstrations": {"demonstrations": 64},
    "1,024 demonstrations": {"demonstrations": 1024},
}
"""Variants of `uniapl`: changes to its settings, by name."""

SEARCH_SEED = 1000
"""First seed of the search. The other parts start at 0, so no prompt and no random draw is shared."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run.

    Example:
        Cell(method="grpo", settings={"optim.learning_rate": 5e-4, "objective.beta": 0.02}, seed=3)
    """

    method: str
    """A key of `PIPELINES`."""
    settings: Mapping[str, Value]
    """Dotted configuration keys, for every stage; and `demonstrations`, their number in the task."""
    seed: int
    """Seed of the task and of the training."""
    reward: str = "honest"
    """A key of :data:`uniapl.demo.rewards.REWARDS`."""

    @property
    def name(self) -> str:
        """A unique file name."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        method = self.method.replace(" -> ", "+")
        return f"{method}-{self.seed}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the run: budget, stages and settings."""
        settings: dict[str, Any] = {}
        for key, value in self.settings.items():
            if key != "demonstrations":
                section, name = key.split(".")
                settings.setdefault(section, {})[name] = value
        # CHORD-phi has a constant mu.
        if self.method == "chord-phi":
            settings["objective"]["mu_peak"] = settings["objective"]["mu_valley"]
        batch = {"demonstrations_per_step": DEMONSTRATIONS // STEPS}
        common = merge(RECIPE, {"seed": self.seed, "max_steps": STEPS, "batching": batch})
        common = merge(common, REWARDS[self.reward])
        first, *others = PIPELINES[self.method]
        if not others:
            return merge(merge(common, first), settings)
        stages = [{"max_steps": STEPS, **stage} for stage in (first, *others)]
        return merge(common, settings) | {"stages": stages}


def settings_of(method: str, reward: str) -> dict[str, Value]:
    """What the search found for the method, with the honest reward or with a wrong one."""
    return SETTINGS[method] | ({} if reward == "honest" else WRONG_REWARD.get(method, {}))


def search_cells(
    method: str, rates: Sequence[float], values: Sequence[Value] | None = None, *, reward: str = "honest"
) -> list[Cell]:
    """Cells of the search: every learning rate with the values of the method's setting (or its default)."""
    knob, known = KNOBS[method]
    return [
        Cell(
            method=method,
            settings={"optim.learning_rate": rate, knob: value},
            seed=SEARCH_SEED,
            reward=reward,
        )
        for rate in rates
        for value in values or known[:1]
    ]


def table_cells(methods: Sequence[str], seeds: int, *, reward: str = "honest") -> list[Cell]:
    """Every method with its settings, by seed."""
    return [
        Cell(method=method, settings=settings_of(method, reward), seed=seed, reward=reward)
        for seed in range(seeds)
        for method in methods
    ]


def front_of(method: str, seed: int) -> list[Cell]:
    """The cells of a front, with the honest reward."""
    knob, values = FRONTS[method]
    return [Cell(method=method, settings={**SETTINGS[method], knob: value}, seed=seed) for value in values]


def ablation_cells(seeds: int, *, reward: str = "honest") -> dict[str, list[Cell]]:
    """The cells of every variant of uniapl, by name."""
    settings = settings_of("uniapl", reward)
    return {
        name: [
            Cell(method="uniapl", settings=settings | changes, seed=seed, reward=reward)
            for seed in range(seeds)
        ]
        for name, changes in ABLATIONS.items()
    }
