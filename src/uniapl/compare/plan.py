"""The plan of a comparison: from a recipe and the texts of `--methods` to cells with their complete
recipes."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from typing import Any

import yaml

from uniapl.compare.budget import Budget, budget_of, fit, rollout_limit
from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.config.resolve import LENGTH, STAGE_KEYS, Resolved, explicit, merge, resolve, stages_of
from uniapl.errors import UsageError

Value = float | int | str | bool

_KNOWN: dict[str, dict[str, Any]] = yaml.safe_load(
    (files("uniapl.compare") / "methods.yaml").read_text(encoding="utf-8")
)
BASE = "base"
"""The name of the model before training in results."""
SEARCH_SEED = 1000
"""Seed of the search; those of the table start at 0."""
RATES = (1 / 3, 1.0, 3.0)
"""Factors of the recipe's learning rate in the first round of the search."""
OF_THE_RUN = (
    *("output_dir", "overwrite", "resume", "seed", "save_steps", "save_total_limit", "report_to", "stages"),
    *("method", "eval_steps", "eval_on_start", "log_completions_steps", "logging_steps", *LENGTH),
    *("run_name", "run_group"),
)
"""Keys of the recipe that a cell sets itself or does not need."""
OF_ONE_METHOD = re.compile(
    r"objective\.(mu_|gate_|lambda_|adversarial_|reward_weight|max_expert_gap|reference_step|teacher_kl)"
    r"|objective\.(pref_|beta_pref)|batching\.cold_start_"
)
"""Keys that describe the recipe's own method and are not settings of the others."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One entry of `--methods`: a method or a pipeline, with settings.

    Example:
        `sft -> grpo[objective.beta=0.02]` is Variant(methods=("sft", "grpo"), settings={"objective.beta":
        0.02})
    """

    methods: tuple[str, ...]
    settings: Mapping[str, Value] = field(default_factory=dict)
    """Dotted keys, for every stage; `demonstrations` is the fraction of them that is used."""
    swept: str | None = None
    """The key of `settings` with several values, each of which is a variant."""

    @property
    def pipeline(self) -> str:
        """The method or the methods, without settings."""
        return " -> ".join(self.methods)

    @property
    def label(self) -> str:
        """The name in tables."""
        given = ", ".join(f"{key}={_text(value)}" for key, value in self.settings.items())
        return f"{self.pipeline}[{given}]" if given else self.pipeline

    @property
    def knob(self) -> tuple[str, Sequence[Value]]:
        """The setting that the search varies, and its values; that of the last method."""
        return _KNOWN[self.methods[-1]]["search"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run with all that determines it."""

    method: str
    """Label of the variant, or `BASE`."""
    settings: Mapping[str, Value] = field(default_factory=dict)
    """The variant's settings and those that the search found."""
    seed: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The complete recipe; {} for the model before training."""
    search: bool = False
    """Train without the validation prompts and measure on them."""

    @property
    def name(self) -> str:
        """A unique file name."""
        canonical = json.dumps(asdict(self), sort_keys=True)
        method = re.sub(r"[^\w-]+", "_", self.method.replace(" -> ", "+")).strip("_")[:60]
        return f"{method}-{self.seed}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


def parse_methods(text: str) -> list[Variant]:
    """The variants of a comma-separated list; a setting with values `a|b` gives one variant for each value.

    Raises:
        UsageError: A method is unknown, a setting has no value, or two entries are equal.
    """
    found: list[Variant] = []
    for item in re.split(r",(?![^\[]*\])", text):
        name, bracket, rest = item.strip().partition("[")
        if bracket and not rest.endswith("]"):
            raise UsageError(f"--methods: '{item.strip()}' has no closing ']'")
        methods = tuple(part.strip() for part in name.split("->"))
        for method in methods:
            if method not in METHODS:
                near = difflib.get_close_matches(method, METHODS, n=1)
                meant = f". Did you mean '{near[0]}'?" if near else ""
                raise UsageError(
                    f"--methods: unknown method '{method}': choose from {', '.join(METHODS)}{meant}"
                )
        found += _swept(Variant(methods=methods), rest[:-1])
    labels = [variant.label for variant in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--methods: '{label}' occurs more than once")
    return found


def _swept(variant: Variant, settings: str) -> list[Variant]:
    swept: str | None = None
    found: list[dict[str, Value]] = [{}]
    for setting in filter(None, (part.strip() for part in settings.split(","))):
        key, equals, values = (part.strip() for part in setting.partition("="))
        if not equals or not values:
            raise UsageError(
                f"--methods: setting '{setting}' of '{variant.pipeline}' must be KEY=VALUE or KEY=A|B"
            )
        sections = [k for k in STAGE_KEYS if k not in ("method", *LENGTH)]
        if key != "demonstrations" and key.partition(".")[0] not in sections:
            allowed = ", ".join(sections)
            raise UsageError(
                f"--methods: '{variant.pipeline}' cannot change '{key}', only demonstrations and keys "
                f"of {allowed}"
            )
        several = [_value(text) for text in values.split("|")]
        if len(several) > 1 and swept:
            raise UsageError(
                f"--methods: '{variant.pipeline}' sweeps '{swept}' and '{key}': sweep one of them"
            )
        swept = key if len(several) > 1 else swept
        found = [{**before, key: value} for before in found for value in several]
    return [replace(variant, settings=one, swept=swept) for one in found]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe whose methods are compared."""

    resolved: Resolved
    stages: Sequence[Config]
    """The recipe's own stages, with their numbers of steps."""

    @property
    def budget(self) -> Budget:
        """The budget of every method."""
        return budget_of(self.stages)

    def recipe(self, variant: Variant, settings: Mapping[str, Value], seed: int) -> dict[str, Any]:
        """The complete recipe of a cell.

        Args:
            settings: Further settings, which win over those of the variant.

        Raises:
            UsageError: The budget lacks what a stage needs, or a setting is not valid.
        """
        given = explicit(self.resolved)
        common = {key: value for key, value in given.items() if key not in OF_THE_RUN}
        settings = {**variant.settings, **settings}
        own = [stage.method for stage in self.stages]
        if [*variant.methods] == own and len(own) > 1:
            changes = _nested(settings)
            stages = [
                merge({**_nested(stage), "num_train_epochs": None, "max_steps": config.max_steps}, changes)
                for stage, config in zip(self.resolved.config.stages, self.stages, strict=True)
            ]
            return _limited({**common, "method": own[-1], "seed": seed, "stages": stages})
        shared = _without(common, OF_ONE_METHOD)
        stages = [self._stage(method, common, settings) for method in variant.methods]
        lengths = self._lengths([merge(shared, stage) for stage in stages], settings)
        stages = [
            merge(_whole(stage, length["max_steps"]), length)
            for stage, length in zip(stages, lengths, strict=True)
        ]
        if len(stages) == 1:
            recipe = merge(shared, stages[0])
        else:
            recipe = {**shared, "method": variant.methods[-1], "stages": stages}
        return _limited({**recipe, "seed": seed})

    def _stage(self, method: str, common: dict[str, Any], settings: Mapping[str, Value]) -> dict[str, Any]:
        """What a stage adds to the settings that all methods share."""
        own = method == self.resolved.config.method and not self.resolved.config.stages
        stage: dict[str, Any] = {"method": method}
        if own:
            stage = merge(stage, _only(common, OF_ONE_METHOD))
        else:
            # The method's own proposals win over the recipe's settings, which are for another method.
            stage = merge(stage, METHODS[method]["proposed"])
            stage = merge(stage, _nested(_KNOWN[method].get("settings", {})))
        stage = merge(stage, _nested(settings))
        if method == "chord-phi" and "objective.mu_valley" in settings:
            # CHORD-phi has a constant mu.
            stage = merge(stage, {"objective": {"mu_peak": settings["objective.mu_valley"]}})
        return stage

    def _lengths(
        self, stages: Sequence[dict[str, Any]], settings: Mapping[str, Value]
    ) -> list[dict[str, Any]]:
        """The lengths and batches of the stages with which they use the budget."""
        steps = self.stages[0].max_steps
        configs = [resolve({**_whole(stage, steps), "max_steps": steps}).config for stage in stages]
        if len(configs) == 1 and budget_of(configs) == self.budget and "demonstrations" not in settings:
            # The recipe's own method: exactly as in the recipe.
            return [{"max_steps": steps}]
        return fit(configs, self.budget, fraction=float(settings.get("demonstrations", 1.0)))

    def cell(self, variant: Variant, seed: int, settings: Mapping[str, Value] | None = None) -> Cell:
        """A cell of the table."""
        settings = settings or {}
        return Cell(
            method=variant.label,
            settings={**variant.settings, **settings},
            seed=seed,
            recipe=self.recipe(variant, settings, seed),
        )

    def search_cells(
        self, variant: Variant, rates: Sequence[float], values: Sequence[Value] | None = None
    ) -> list[Cell]:
        """Cells of the search: every learning rate with the values of the method's knob, or its default."""
        knob, known = variant.knob
        tried = [None] if knob in variant.settings else values or known[:1]
        found: list[Cell] = []
        for rate in rates:
            for value in tried:
                settings = {"optim.learning_rate": rate, **({} if value is None else {knob: value})}
                found.append(replace(self.cell(variant, SEARCH_SEED, settings), search=True))
        return found

    @property
    def rates(self) -> list[float]:
        """Learning rates of the first round of the search."""
        return [float(f"{factor * self.stages[0].optim.learning_rate:.2g}") for factor in RATES]


def _limited(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe, in which each stage that may replace rollouts ends with its part of the budget."""
    limits = [rollout_limit(stage.config) for stage in stages_of(resolve(recipe))]
    if "stages" not in recipe:
        return merge(recipe, limits[0])
    return {**recipe, "stages": [merge(s, limit) for s, limit in zip(recipe["stages"], limits, strict=True)]}


def _whole(stage: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The stage with a decay that is given as a fraction of the steps (a float) in steps."""
    decay = stage.get("objective", {}).get("mu_decay_steps")
    return merge(
        dict(stage),
        {"objective": {"mu_decay_steps": round(decay * steps)}} if isinstance(decay, float) else {},
    )


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with the dotted keys; `demonstrations` is not a key of a recipe."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        if key != "demonstrations":
            for part in reversed(key.split(".")):
                value = {part: value}
            nested = merge(nested, value)
    return nested


def _without(values: Mapping[str, Any], pattern: re.Pattern[str], prefix: str = "") -> dict[str, Any]:
    """The mapping without the dotted keys that match."""
    return {
        key: _without(value, pattern, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if not pattern.match(f"{prefix}{key}")
    }


def _only(values: Mapping[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    """The dotted keys of a mapping of sections that match."""
    found = {
        section: {key: value for key, value in inner.items() if pattern.match(f"{section}.{key}")}
        for section, inner in values.items()
        if isinstance(inner, dict)
    }
    return {section: inner for section, inner in found.items() if inner}


def _value(text: str) -> Value:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        # YAML reads 1e-5 as text.
        try:
            return float(value)
        except ValueError:
            return value
    if not isinstance(value, (bool, int, float)):
        raise UsageError(f"--methods: '{text}' is not a number or a word")
    return value


def _text(value: Value) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
