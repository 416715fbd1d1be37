"""From defaults, method, recipe and flags to one configuration, with the source of every value.

Precedence, weakest first: defaults, what the method proposes, the recipe, the flags, what the method fixes.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from uniapl.config import Config
from uniapl.config.methods import METHODS
from uniapl.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)

# What other libraries call it -> our key.
SYNONYMS = {
    "group_size": "rollout.num_generations",
    "n_samples_per_prompt": "rollout.num_generations",
    "repeat_times": "rollout.num_generations",
    "max_new_tokens": "rollout.max_completion_length",
    "max_tokens": "rollout.max_completion_length",
    "lr": "optim.learning_rate",
    "model": "model.model_name_or_path",
    "mu": "objective.mu_peak",
    "lambda": "objective.lambda_adv",
    "lora_rank": "model.lora_r",
    "kl_coef": "objective.beta",
    "epsilon_low": "objective.epsilon",
    "clip_range": "objective.epsilon",
    "reward_funcs": "rewards.functions",
    "dataset_name": "data.path",
    "train_dataset": "data.path",
    "resume_from_checkpoint": "resume",
    "batch_size": "batching.prompts_per_step",
    "train_batch_size": "batching.prompts_per_step",
    "num_steps": "max_steps",
    "use_vllm": "rollout.sampler",
    "vllm_server_timeout": "rollout.vllm_timeout",
    "vllm_importance_sampling_cap": "rollout.vllm_importance_sampling_clip_max",
}

# Keys of before 0.1.0 -> today's.
RENAMED = {
    "completion_steps": "log_completions_steps",
    "gradient_steps": "log_gradients_steps",
    "stop": "early_stopping",
    "batching.max_tokens": "batching.max_tokens_per_micro_batch",
    "data.string_prompts": "data.prompt_format",
    "discriminator.against": "discriminator.density_ratio_reference",
    "discriminator.freeze_step": "discriminator.freeze_after_steps",
    "discriminator.held_out_share": "discriminator.held_out_fraction",
    "discriminator.lora_rank": "discriminator.lora_r",
    "discriminator.reads_example": "discriminator.in_context_demonstration",
    "discriminator.replay_share": "discriminator.replay_fraction",
    "health.max_accuracy": "health.max_discriminator_accuracy",
    "health.max_zero_std": "health.max_frac_reward_zero_std",
    "objective.adversarial_assignment": "objective.adversarial_credit",
    "objective.gate_reward": "objective.gate_threshold",
    "rollout.max_rows": "rollout.max_batch_size",
    "rollout.one_step_off": "rollout.max_off_policy_steps",
}

# What pydantic says in Python's words -> what it means in a recipe.
PLAIN_MESSAGES = {
    "tuple_type": "must be a list",
    "model_type": "must be a section with keys",
    "dict_type": "must be a mapping of keys to values",
}

LARGEST_RECIPE = 100_000
"""Keys and values of a recipe: a few lines of aliases of aliases would fill any memory."""

# What a stage of a pipeline may change; model, data and rewards belong to the whole run.
STAGE_KEYS = (
    "method",
    "max_steps",
    "rollout",
    "objective",
    "discriminator",
    "optim",
    "batching",
    "health",
    "early_stopping",
)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration, where each value came from, and what the user should know about the merge."""

    config: Config
    sources: dict[str, str]
    """Dotted key -> "default", "method", "recipe" or "flag"."""
    notes: tuple[str, ...]


class _StrictLoader(yaml.SafeLoader):
    """Plain data only; a key is text, and one that stands twice an error: its first value would be lost."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > LARGEST_RECIPE:
            raise yaml.MarkedYAMLError(problem="it is endless once its aliases are written out")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name = str(key.value)
            if name in seen:
                problem = f"'{name}' stands twice; write its values in one place"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                problem = f"the key {key!r} is no text; put it in quotes, if it is meant so"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return mapping


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes of a document once its aliases are written out; too many where one stands in itself."""
    if id(node) not in known:
        known[id(node)] = LARGEST_RECIPE
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for item in parts for part in (item if isinstance(item, tuple) else [item])]
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def load_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: The file is missing, is not YAML, or holds something else than a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the recipe '{path}': {error}") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe '{path}' is not valid YAML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"the recipe '{path}' is not valid YAML: it is nested too deeply") from error
    except Exception as error:  # of values that look like a number or a date and are none
        raise UsageError(f"the recipe '{path}' holds a value that cannot be read: {error!r}") from error
    if not isinstance(content, dict):
        raise UsageError(f"the recipe '{path}' must be a mapping of keys to values")
    return content


def resolve(recipe: dict[str, Any], flags: Sequence[str] = ()) -> Resolved:
    """Merge a recipe's mapping with command-line flags and the method's settings.

    Raises:
        UsageError: An unknown key (with a suggestion), a value of the wrong type, or values that contradict.
    """
    recipe = _nested(recipe)
    method = _method_of(recipe, flags)
    proposed = {"method": method, "objective": METHODS[method]["proposed"]}
    base = validate(Config, merge(proposed, recipe))
    config = _apply_flags(base, flags) if flags else base
    notes: list[str] = []
    before = flatten(config)
    fixed = {f"objective.{key}": value for key, value in METHODS[method]["fixed"].items()}
    config = validate(Config, merge(config.model_dump(), {"objective": METHODS[method]["fixed"]}))
    in_recipe = [key for key, value in flatten(recipe).items() if value != {}]
    from_base = flatten(base)
    named = {flag.removeprefix("--").split("=", 1)[0].replace("-", "_") for flag in flags if flag[:2] == "--"}
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


def _nested(recipe: dict[str, Any]) -> dict[str, Any]:
    """`discriminator.lora_r: 8`, as flags and documents write it, as a key of its section."""
    nested: dict[str, Any] = {}
    for key, value in recipe.items():
        for part in reversed(key.split(".") if isinstance(key, str) else [key]):
            value = {part: value}
        nested = merge(nested, value)
    return nested


def _inactive_components(config: Config) -> list[str]:
    """What is switched on and begins only after the last step."""
    if config.stages:
        return []
    objective, discriminator, last = config.objective, config.discriminator, f"max_steps {config.max_steps}"
    notes: list[str] = []
    if objective.beta > 0 and objective.reference_step >= config.max_steps:
        notes.append(f"no KL acts: objective.reference_step {objective.reference_step} is not below {last}")
    learns = objective.lambda_adv > 0 and discriminator.kind == "bradley-terry"
    if learns and discriminator.warmup_steps >= config.max_steps:
        warmup = discriminator.warmup_steps
        notes.append(f"no adversary acts: discriminator.warmup_steps {warmup} is not below {last}")
    return notes


def stages_of(resolved: Resolved) -> list[Resolved]:
    """One configuration per stage; a run without stages is its own only stage.

    Raises:
        UsageError: A stage has no method, or an unknown key.
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
            if key not in STAGE_KEYS:
                raise UsageError(f"stage {number} cannot change '{key}', only {', '.join(STAGE_KEYS)}")
        try:
            stages.append(resolve(merge({**base, "objective": given}, stage)))
        except UsageError as error:
            raise UsageError(f"stage {number}: {error}") from error
    return stages


def validate(model: type[Model], values: dict[str, Any]) -> Model:
    """The model built from a mapping; every error names its key and, where there is one, the likely meaning.

    Raises:
        UsageError: With one line per wrong key or value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines: list[str] = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key '{key:.80}'{suggestion(key)}")
            else:
                message = PLAIN_MESSAGES.get(problem["type"], problem["msg"])
                lines.append(f"{key}: {message} (got {problem['input']!r:.80})")
        raise UsageError("\n".join(lines)) from None


def suggestion(key: str) -> str:
    """ "; did you mean ...?" for an unknown key, or where to find those that there are."""
    known = [*flatten(Config()), "rewards.functions"]
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == leaf]
    # Of the two optimizers, the policy's is meant.
    same_leaf.sort(key=lambda candidate: candidate.startswith("discriminator."))
    section, _, rest = key.partition(".")
    renamed = RENAMED.get(key) or (f"{RENAMED[section]}.{rest}" if section in RENAMED else None)
    best = renamed or SYNONYMS.get(leaf) or (same_leaf[0] if same_leaf else None)
    if best is None:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        leaves = {candidate.rsplit(".", 1)[-1]: candidate for candidate in known}
        near_leaf = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
        best = near[0] if near else leaves[near_leaf[0]] if near_leaf else None
    return f"; did you mean '{best}'?" if best else "; `uniapl train --help` lists the keys"


def merge(weak: dict[str, Any], strong: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, nested ones merged, with the second winning."""
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


def _method_of(recipe: dict[str, Any], flags: Sequence[str]) -> str:
    """The method, read before everything else because it decides what the others default to."""
    method = recipe.get("method", Config().method)
    for position, flag in enumerate(flags):
        if flag == "--method" and position + 1 < len(flags):
            method = flags[position + 1]
        elif flag.startswith("--method="):
            method = flag.split("=", 1)[1]
    if not isinstance(method, str) or method not in METHODS:
        raise UsageError(f"unknown method {method!r:.80}: choose one of {', '.join(METHODS)}")
    return method


def _apply_flags(base: Config, flags: Sequence[str]) -> Config:
    """`base` changed by `--key value` flags; tyro prints usage errors itself and exits with 2."""
    import tyro

    flags = list(flags)
    for position, flag in enumerate(flags):
        following = flags[position + 1 : position + 2]
        if flag == "--overwrite" and (not following or following[0].startswith("--")):
            flags[position] = "--overwrite=True"
    known = {key.replace("_", "-") for key in flatten(Config())}
    for flag in flags:
        key = flag.removeprefix("--").split("=", 1)[0].replace("_", "-")
        name = key.replace("-", "_")
        renamed = name in RENAMED or name.split(".")[0] in RENAMED
        if flag.startswith("--") and key not in known and (renamed or name in SYNONYMS):
            raise UsageError(f"unknown flag '{flag}'{suggestion(name)}")
    return tyro.cli(
        Config,
        default=base,
        args=flags,
        prog=f"uniapl {sys.argv[1] if len(sys.argv) > 1 else 'train'} RECIPE",
        config=(tyro.conf.FlagConversionOff,),
    )
