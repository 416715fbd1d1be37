"""Merge defaults, method, recipe and flags into one configuration, with the source of every value.

Precedence, weakest first: defaults, the method's proposals, the recipe, the flags, what the method fixes.
"""

import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.config.suggestions import suggestion
from uniapl.errors import UsageError
from uniapl.files import expand_home

Model = TypeVar("Model", bound=BaseModel)

# Error types of pydantic whose own message uses Python's words.
PLAIN_MESSAGES = {
    "tuple_type": "must be a list",
    "model_type": "must be a section with keys",
    "dict_type": "must be a mapping of keys to values",
}

# Bounded, unlike repr() of YAML's aliases of aliases.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 200, 200

# Keys that a stage may change; model, data and rewards belong to the whole run.
STAGE_KEYS = "method max_steps rollout objective discriminator optim batching health early_stopping".split()


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration with the source of every value."""

    config: Config
    sources: dict[str, str]
    """Dotted key -> "default", "method", "recipe" or "flag"."""
    notes: tuple[str, ...]
    """Notes on the merge for the user."""


class _StrictLoader(yaml.SafeLoader):
    """Plain data whose keys are text; a duplicate key or a recursive alias is an error."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # Otherwise recursive aliases build recursive data.
        return super().construct_document(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark
                )
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
    if not isinstance(content, dict):
        raise UsageError(f"the recipe '{path}' must be a mapping of keys to values")
    return content


def resolve(recipe: dict[str, Any], flags: Sequence[str] = ()) -> Resolved:
    """Merge a recipe's mapping with command-line flags and the method's settings.

    Raises:
        UsageError: A key is unknown, a value has the wrong type, or values contradict each other.
    """
    recipe = _nested(recipe)
    method = _method_of(recipe, flags)
    proposed = {"method": method, "objective": METHODS[method]["proposed"]}
    base = validate(Config, merge(proposed, recipe))
    config = _apply_flags(base, flags) if flags else base
    from_base, before = flatten(base), flatten(config)
    fixed = {f"objective.{key}": value for key, value in METHODS[method]["fixed"].items()}
    config = validate(Config, merge(config.model_dump(), _nested(fixed)))
    in_recipe = [key for key, value in flatten(recipe).items() if value != {}]
    named = {_flag_key(flag) for flag in flags if flag.startswith("--")}
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
    return Resolved(config=config, sources=sources, notes=(*notes, *_inactive_components(config)))


def stages_of(resolved: Resolved) -> list[Resolved]:
    """One configuration per stage; a run without stages is one stage.

    Raises:
        UsageError: A stage has no method or a key that is unknown or that a stage cannot change.
    """
    config = resolved.config
    if not config.stages:
        return [resolved]
    base = config.model_dump(exclude={"stages"})
    given = {
        key: value
        for key, value in base["objective"].items()
        if resolved.sources[f"objective.{key}"] in ("recipe", "flag")
    }
    stages: list[Resolved] = []
    for number, stage in enumerate(config.stages, start=1):
        if "method" not in stage:
            raise UsageError(f"stage {number} needs a method: one of {', '.join(METHODS)}")
        for key in stage:
            section = key.split(".")[0]
            if section in STAGE_KEYS:
                continue
            if section not in Config.model_fields:
                raise UsageError(f"stage {number}: {_unknown(key)}")
            raise UsageError(f"stage {number} cannot change '{key}', only {', '.join(STAGE_KEYS)}")
        try:
            stages.append(resolve(merge({**base, "objective": given}, stage)))
        except UsageError as error:
            raise UsageError(f"stage {number}: {error}") from error
    return stages


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """The model built from a mapping.

    Raises:
        UsageError: With one line per wrong key or value, which names the key and, if found, the likely one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines: list[str] = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(_unknown(key))
            else:
                message = PLAIN_MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
                lines.append(f"{key}: {message} (got {_REPR.repr(problem['input']):.80})")
        raise UsageError("\n".join(lines)) from None


def merge(weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, merged recursively; the second one wins."""
    merged = dict(weak)
    for key, value in strong.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(values: BaseModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, for every key that is not a section."""
    values = values.model_dump() if isinstance(values, BaseModel) else values
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nested(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with dotted keys such as `discriminator.lora_r: 8` moved into their sections."""
    nested: dict[str, Any] = {}
    for key, value in recipe.items():
        for part in reversed(key.split(".") if isinstance(key, str) else [key]):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def _inactive_components(config: Config) -> list[str]:
    """Notes on loss components that are enabled but would begin only after the last step."""
    if config.stages:
        return []
    objective, discriminator, last = config.objective, config.discriminator, f"max_steps {config.max_steps}"
    notes: list[str] = []
    if objective.beta > 0 and objective.reference_step >= config.max_steps:
        notes.append(
            f"the KL is never used: objective.reference_step {objective.reference_step} is not below {last}"
        )
    trained = objective.lambda_adv > 0 and discriminator.kind == "bradley-terry"
    if trained and discriminator.warmup_steps >= config.max_steps:
        warmup = discriminator.warmup_steps
        notes.append(f"the adversary is never used: discriminator.warmup_steps {warmup} is not below {last}")
    return notes


def _unknown(key: str, kind: str = "key") -> str:
    return f"unknown {kind} '{key:.80}'{suggestion(_flag_key(key), flatten(Config()))}"


def _method_of(recipe: dict[str, Any], flags: Sequence[str]) -> str:
    """The method, which is read first because it decides the defaults of other keys."""
    method = recipe.get("method", Config().method)
    for position, flag in enumerate(flags):
        if flag == "--method" and position + 1 < len(flags):
            method = flags[position + 1]
        elif flag.startswith("--method="):
            method = flag.split("=", 1)[1]
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"unknown method {_REPR.repr(method):.80}: choose one of {', '.join(METHODS)}")
    return method


def _flag_key(flag: str) -> str:
    return flag.removeprefix("--").split("=", 1)[0].replace("-", "_")


def _apply_flags(base: Config, flags: Sequence[str]) -> Config:
    """`base` changed by `--key value` flags; tyro prints errors in values itself and exits with code 2."""
    import tyro

    arguments, known = list(flags), [f"{key}." for key in flatten(Config())]
    for position, flag in enumerate(flags):
        if flag == "--overwrite" and (position + 1 == len(flags) or flags[position + 1].startswith("--")):
            arguments[position] = "--overwrite=True"
        elif (
            flag.startswith("--") and flag != "--help" and not f"{_flag_key(flag)}.".startswith(tuple(known))
        ):
            raise UsageError(_unknown(flag, "flag"))
    return tyro.cli(
        Config,
        default=base,
        args=arguments,
        prog=f"uniapl {sys.argv[1] if len(sys.argv) > 1 else 'train'} RECIPE",
        config=(tyro.conf.FlagConversionOff,),
    )
