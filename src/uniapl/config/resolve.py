"""Merge defaults, method, recipe and flags into one configuration, with the source of every value.

Precedence, weakest first: defaults, the method's proposals, the recipe, the flags, what the method fixes.
"""

import contextlib
import difflib
import re
import reprlib
import sys
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from uniapl.config import Config
from uniapl.config.flags import apply_flags, flag_of, parse_flags
from uniapl.config.methods import METHODS
from uniapl.config.other_libraries import OTHER_NAMES
from uniapl.config.section import flatten
from uniapl.config.suggestions import suggestion, unknown
from uniapl.errors import UsageError
from uniapl.files import expand_home
from uniapl.untyped import is_dict

Model = TypeVar("Model", bound=BaseModel)

# Error types of pydantic whose own message uses Python's words.
PLAIN_MESSAGES = {
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "missing": "is required",
    "tuple_type": "must be a list",
    "model_type": "must be a section with keys",
    "dict_type": "must be a mapping of keys to values",
}

# pydantic puts the member of a union after the key, such as tuple[str, ...] after data.path.
_UNION_MEMBER = re.compile(r"(function-after|tuple)\[.*\]")

# Bounded, unlike repr() of YAML's aliases of aliases.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 200, 200

# Keys that a stage may change; model, data and rewards belong to the whole run.
LENGTH = ("max_steps", "num_train_epochs")
STAGE_KEYS = (
    "method",
    *LENGTH,
    *"rollout objective discriminator optim batching health early_stopping".split(),
)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration with the source of every value."""

    config: Config
    sources: dict[str, str]
    """Dotted key -> "default", "method", "recipe" or "flag"; of max_steps also "num_train_epochs"."""
    notes: tuple[str, ...]
    """Notes on the merge for the user."""
    path: str | Path | None = None
    """The recipe's file."""


class _StrictLoader(yaml.SafeLoader):
    """Plain data whose keys are text; a duplicate key or a recursive alias is an error."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # Otherwise recursive aliases build recursive data.
        return cast("Any", super()).construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        pairs: list[Any] = node.value if isinstance(node, yaml.MappingNode) else []
        for key, _ in pairs:
            if key.value in seen:
                problem = f"duplicate key '{key.value}'"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if not key.tag.endswith((":str", ":merge")):
                problem = f"the key {key.value!r} is not text; put it in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: The file is missing, is not valid YAML, or does not contain a mapping.
    """
    try:
        text = Path(expand_home(str(path))).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        folder = Path(expand_home(str(path))).parent
        others = [str(other) for suffix in ("yaml", "yml") for other in folder.glob(f"*.{suffix}")]
        near = difflib.get_close_matches(str(path), others, n=1)
        hint = f". Did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"cannot read the recipe '{path}': file not found{hint}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the recipe '{path}': {error}") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        explained = str(error).replace("<unicode string>", str(path))
        raise UsageError(f"the recipe '{path}' is not valid YAML: {explained}") from error
    except RecursionError as error:
        raise UsageError(f"the recipe '{path}' is not valid YAML: it is nested too deeply") from error
    except Exception as error:  # PyYAML lets errors of int() and date() through.
        raise UsageError(f"the recipe '{path}' contains a value that cannot be read: {error!r}") from error
    if not is_dict(content):
        raise UsageError(f"the recipe '{path}' must be a mapping of keys to values")
    return content


def resolve(recipe: dict[str, Any], flags: Sequence[str] = (), *, path: str | Path | None = None) -> Resolved:
    """Merge a recipe's mapping with command-line flags and the method's settings.

    Args:
        path: The recipe's file, which errors name.

    Raises:
        UsageError: A key is unknown, a value has the wrong type, or values contradict each other.
    """
    recipe = _nested(recipe)
    show_help = "--help" in flags
    parsed = parse_flags([flag for flag in flags if flag != "--help"])
    method = dict(parsed).get(("method",))
    with _named(path if method is None else None):
        method = _method(recipe.get("method", Config().method) if method is None else method)
    proposed = {"method": method, **METHODS[method]["proposed"]}
    with _named(path):
        base = validate(Config, merge(proposed, recipe))
    named = {".".join(key) for key, _ in parsed}
    config = validate(Config, apply_flags(base.model_dump(), parsed), flags=named) if parsed else base
    if show_help:
        _print_help(config)
    from_base, before = flatten(base), flatten(config)
    # With stages, the run's method trains nothing, and the values belong to the methods of the stages.
    of_method = {} if config.stages else METHODS[method]["fixed"]
    fixed = {f"objective.{key}": value for key, value in of_method.items()}
    config = validate(Config, merge(config.model_dump(), _nested(fixed)))
    in_recipe = [key for key, value in flatten(recipe).items() if value != {}]
    notes: list[str] = []
    sources = dict.fromkeys(flatten(config), "default")
    for key in sources:
        if key in fixed or key in flatten(proposed):
            sources[key] = "method"
        if any(key == given or key.startswith(f"{given}.") for given in in_recipe):
            sources[key] = "recipe"
        if before.get(key) != from_base.get(key) or key in named:
            sources[key] = "flag"
        if key in fixed and sources[key] in ("recipe", "flag"):
            if before[key] != fixed[key]:
                notes.append(f"method '{method}' sets {key} = {fixed[key]} ({sources[key]}: {before[key]})")
            sources[key] = "method"
    if config.num_train_epochs is not None and sources["max_steps"] != "default":
        raise UsageError(
            f"num_train_epochs ({sources['num_train_epochs']}) and max_steps ({sources['max_steps']}) both "
            "set the number of steps: remove one of them (--num-train-epochs null removes the first)"
        )
    resolved = Resolved(config=config, sources=sources, notes=tuple(notes), path=path)
    return resolved if config.num_train_epochs is not None else with_notes(resolved)


def with_notes(resolved: Resolved) -> Resolved:
    """`resolved` with notes on what cannot act within its number of steps."""
    return replace(resolved, notes=(*resolved.notes, *_inactive_components(resolved.config)))


def stages_of(resolved: Resolved) -> list[Resolved]:
    """One configuration per stage; a run without stages is one stage.

    Raises:
        UsageError: A stage has no method or a key that is unknown or that a stage cannot change.
    """
    config = resolved.config
    if not config.stages:
        return [resolved]
    with _named(resolved.path):
        return _stages(resolved)


def _stages(resolved: Resolved) -> list[Resolved]:
    config = resolved.config
    base = config.model_dump(exclude={"stages", *LENGTH})
    # What the run's method proposes is not a setting of its stages, which have their own methods.
    for key, source in resolved.sources.items():
        section, dot, name = key.partition(".")
        if dot and source not in ("recipe", "flag"):
            base[section].pop(name, None)
    stages: list[Resolved] = []
    for number, stage in enumerate(config.stages, start=1):
        if "method" not in stage:
            raise UsageError(f"stage {number} needs a method: one of {', '.join(METHODS)}")
        for key in stage:
            section = key.split(".")[0]
            if section in STAGE_KEYS:
                continue
            if section not in Config.model_fields:
                raise UsageError(f"stage {number}: {unknown(key)}")
            raise UsageError(f"stage {number} cannot change '{key}', only {', '.join(STAGE_KEYS)}")
        try:
            stages.append(resolve(merge({**base, **_length(config, stage)}, stage)))
        except UsageError as error:
            raise UsageError(f"stage {number}: {error}") from error
        if stages[-1].config.rollout.tools != config.rollout.tools:
            raise UsageError(
                f"stage {number} cannot change 'rollout.tools', because the prompts of all stages show the "
                "same tools: set it for the whole run"
            )
    return stages


def _length(config: Config, stage: dict[str, Any]) -> dict[str, Any]:
    """The key with the number of steps that a stage takes from the recipe; {} if it has its own."""
    if any(stage.get(key) is not None for key in LENGTH):
        return {}
    key = "max_steps" if config.num_train_epochs is None else "num_train_epochs"
    return {key: getattr(config, key)}


def explicit(resolved: Resolved) -> dict[str, Any]:
    """The keys that the recipe and its flags set, as a recipe's mapping of plain values."""

    def kept(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            if f"{prefix}{key}" in resolved.sources:
                if resolved.sources[f"{prefix}{key}"] in ("recipe", "flag"):
                    found[key] = value
            elif is_dict(value) and (inner := kept(value, f"{prefix}{key}.")):
                found[key] = inner
        return found

    return kept(resolved.config.model_dump(mode="json"), "")


def validate(model: type[Model], values: dict[str, Any], *, flags: Collection[str] = ()) -> Model:
    """The model built from a mapping.

    Args:
        flags: Keys that flags have set; errors name the flags.

    Raises:
        UsageError: With one line per wrong key or value, which names the key and, if found, the likely one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines: list[str] = []
        for problem in error.errors():
            parts = [part for part in map(str, problem["loc"]) if not _UNION_MEMBER.fullmatch(part)]
            key = ".".join(parts)
            if problem["type"] == "extra_forbidden":
                lines.append(unknown(key))
                continue
            message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
            message = PLAIN_MESSAGES.get(problem["type"], message)
            if problem["type"] == "model_type" and key in OTHER_NAMES:
                message += suggestion(key)
            if any(f"{key}.".startswith(f"{flag}.") for flag in flags):
                key = flag_of(parts)
            # The input of a rule between several keys is their whole section.
            got = "" if isinstance(problem["input"], dict) else f" (got {_REPR.repr(problem['input']):.80})"
            lines.append(f"{key}: {message}{got}".removeprefix(": "))
        raise UsageError("\n".join(lines)) from None


def merge(weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, merged recursively; the second one wins."""
    merged = dict(weak)
    for key, value in strong.items():
        both = is_dict(value) and is_dict(merged.get(key))
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _nested(recipe: Mapping[Any, Any]) -> dict[str, Any]:
    """The recipe with dotted keys such as `discriminator.lora_r: 8` moved into their sections."""
    nested: dict[str, Any] = {}
    for key, value in recipe.items():
        for part in reversed(key.split(".") if isinstance(key, str) else [key]):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def _inactive_components(config: Config) -> list[str]:
    """Notes on what is enabled and would begin, or be complete, only after the last step."""
    if config.stages:
        return []
    objective, batching, last = config.objective, config.batching, f"max_steps {config.max_steps}"
    cold = f"batching.cold_start_steps {batching.cold_start_steps:g}"
    if config.cold_start_steps and batching.cold_start_steps < 1:
        cold += f" ({config.cold_start_steps} steps)"
    reference = (
        cold if objective.reference_step is None else f"objective.reference_step {config.reference_step}"
    )
    samples = objective.uses_rollouts and not batching.cold_start_prompts_per_step
    only_cold = samples and config.cold_start_steps >= config.max_steps
    warmup, mu_warmup = config.optim.warmup_steps, objective.mu_warmup_steps
    rising = objective.mu_controller == "schedule" and objective.mu_peak > 0
    limits = (
        ("no rollouts are sampled", cold, config.cold_start_steps, samples),
        ("the KL is never used", reference, config.reference_step, objective.beta > 0 and not only_cold),
        (
            "no preference pair is used",
            reference,
            config.reference_step,
            objective.pref_weight > 0 and not only_cold,
        ),
        (
            "the adversary is never used",
            _adversary_wait(config, cold, reference),
            config.adversary_step,
            objective.lambda_adv > 0 and not only_cold,
        ),
        (
            "the learning rate never reaches its value",
            f"optim.warmup_steps {warmup}" + (f" after {cold}" if config.cold_start_steps else ""),
            warmup + config.cold_start_steps,
            bool(warmup),
        ),
        ("mu never reaches mu_peak", f"objective.mu_warmup_steps {mu_warmup}", mu_warmup, rising),
    )
    notes = [
        f"{problem}: {keys} is not below {last}"
        for problem, keys, steps, enabled in limits
        if enabled and steps >= config.max_steps
    ]
    if batching.cold_start_steps and not config.cold_start_steps and not objective.mu_peak:
        notes.append(f"there is no cold start ({cold}): the method does not train on demonstrations")
    elif batching.cold_start_steps and not config.cold_start_steps:
        notes.append(f"there is no cold start: {cold} of {last} is rounded to 0 steps")
    return notes


def _adversary_wait(config: Config, cold: str, reference: str) -> str:
    """The keys that make up `adversary_step`, with their values.

    Args:
        cold: The key and value of the cold start.
        reference: Those of the step at which the KL reference begins to exist.
    """
    settings, keys = config.discriminator, list[str]()
    without = 0 if config.batching.cold_start_prompts_per_step else config.cold_start_steps
    if settings.reads_reference and config.reference_step > without:
        keys.append(reference)
    elif without:
        keys.append(cold)
    if settings.is_trained and settings.warmup_steps:
        keys.append(f"discriminator.warmup_steps {settings.warmup_steps}")
    return " plus ".join(keys)


def _method(method: Any) -> str:
    """The method, which is read first because it decides the defaults of other keys."""
    if not isinstance(method, str) or method not in METHODS:
        near = difflib.get_close_matches(str(method).lower(), METHODS, n=1)
        meant = f". Did you mean '{near[0]}'?" if near else ""
        raise UsageError(
            f"unknown method {_REPR.repr(method):.80}: choose one of {', '.join(METHODS)}{meant}"
        )
    return method


@contextlib.contextmanager
def _named(path: str | Path | None) -> Generator[None]:
    """Put the recipe's file before each line of an error."""
    try:
        yield
    except UsageError as error:
        if path is None:
            raise
        raise UsageError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error


def _print_help(config: Config) -> None:
    """Print all flags with their values, and exit."""
    import tyro

    tyro.cli(
        Config,
        default=config,
        args=["--help"],
        prog=f"uniapl {sys.argv[1] if len(sys.argv) > 1 else 'train'} RECIPE",
        config=(tyro.conf.FlagConversionOff,),
    )
