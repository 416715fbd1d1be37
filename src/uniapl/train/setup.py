"""Everything that a run needs before its first step, and everything that can be found wrong by then."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerBase

from uniapl import data
from uniapl.adapters import require_peft
from uniapl.config import Config, ModelConfig
from uniapl.data import Dataset
from uniapl.discriminator.polar import PolarFormat
from uniapl.errors import UsageError
from uniapl.evaluation import Suite, load_suites
from uniapl.files import write_text
from uniapl.loading import load_model_config, load_stop_ids, load_tokenizer, refuse_adapter
from uniapl.posting import check_address
from uniapl.report.reading import ENDING, MODEL_ANALYSIS
from uniapl.resolve import STAGE_KEYS, Resolved, flatten, load_recipe
from uniapl.rewards import Rewarder
from uniapl.rewards.base import build_rewarder
from uniapl.rollout.engines import check_vllm
from uniapl.streams import split_streams
from uniapl.train import checkpoint
from uniapl.types import Example, derive_seed

# What speaks of a run that has ended.
AFTERWARDS = (ENDING, MODEL_ANALYSIS, "report.html")
RUN_FILES = (
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "completions.jsonl",
    "health.jsonl",
    *AFTERWARDS,
)
WEIGHTS_IN_TRANSIT = "weights-for-vllm"
"""Directory of a run: there only while vLLM loads it."""
RUN_DIRECTORIES = ("checkpoints", "stages", "final", "skipped", WEIGHTS_IN_TRANSIT)


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What a run is made of, the model's weights aside: loaded and checked."""

    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    rewarder: Rewarder
    stop_ids: frozenset[int]
    """Every token that ends an answer: the sampler stops at them, demonstrations are cut behind them."""
    data_sha256: str
    notes: tuple[str, ...] = ()
    """What the user should hear of the data."""
    suites: tuple[Suite, ...] = ()
    """What is evaluated."""

    @property
    def pad_id(self) -> int:
        """What fills the rows of a batch; masks never look at it."""
        assert isinstance(self.tokenizer.pad_token_id, int)
        return self.tokenizer.pad_token_id


def load_materials(
    resolved: Resolved,
    stages: Sequence[Resolved],
    *,
    train_dataset: Iterable[Mapping[str, Any]] | None = None,
    reward_functions: Sequence[Callable[..., Any]] | Callable[..., Any] = (),
    with_suites: bool = True,
) -> Materials:
    """Tokenizer, data, reward functions and suites, each checked against what the stages need of them.

    Raises:
        UsageError: Anything that would have to fail later, named with its remedy.
    """
    config = resolved.config
    _check_recipe(config)
    tokenizer = load_tokenizer(config.model)
    model_config = load_model_config(config.model)
    rows = data.read_rows(config.data) if train_dataset is None else list(enumerate(train_dataset, start=1))
    stop_ids = load_stop_ids(config.model, model_config, tokenizer)
    context_length = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    source = config.data.path if train_dataset is None else None
    with data.named_source(source):
        dataset = data.prepare(
            rows,
            tokenizer,
            config.data,
            stop_ids=stop_ids,
            context_length=context_length,
            max_completion_length=max(
                (s.config.rollout.max_completion_length for s in stages if s.config.objective.uses_rollouts),
                default=0,
            ),
        )
    functions = [reward_functions] if callable(reward_functions) else reward_functions
    rewarder = build_rewarder(config.rewards, functions)
    uses_rollouts = any(stage.config.objective.uses_rollouts for stage in stages)
    notes: list[str] = []
    if uses_rollouts:
        rewarder.check_columns(dataset.examples)
        with data.named_source(source):
            notes = rewarder.check_rows(dataset.examples, allow_code=config.rewards.allow_code_verifiers)
    for stage in stages:
        check_stage(stage.config, dataset, rewarder, notes)
    if uses_rollouts:
        rewarder.try_out(dataset.examples)
    content = json.dumps([row for _, row in rows], default=repr, sort_keys=True)
    suites: tuple[Suite, ...] = ()
    if with_suites:
        suites = load_suites(
            config, tokenizer, functions=functions, stop_ids=stop_ids, context_length=context_length
        )
        notes += [f"suite '{suite.name}': {note}" for suite in suites for note in suite.notes]
    return Materials(
        tokenizer=tokenizer,
        dataset=dataset,
        rewarder=rewarder,
        stop_ids=stop_ids,
        data_sha256=hashlib.sha256(content.encode()).hexdigest(),
        notes=tuple(notes),
        suites=suites,
    )


def _check_recipe(config: Config) -> None:
    if config.eval_steps and not config.evaluation.suites:
        raise UsageError(
            "eval_steps: there is nothing to look at; name files or benchmarks in evaluation.suites"
        )
    if config.model.lora_r is not None:
        require_peft()


def check_stage(config: Config, dataset: Dataset, rewarder: Rewarder, notes: Sequence[str] = ()) -> None:
    """Whether the data and the rewards hold what the method needs.

    Args:
        notes: What the reward functions said of the rows: it may be why none of them applies.

    Raises:
        UsageError: Naming the method, what is missing, and how to give it.
    """
    objective, method = config.objective, config.method
    prompts, demonstrations = streams(config, dataset, rewarder)
    if objective.learns_from_rewards and not rewarder.rewards:
        raise UsageError(
            f"method '{method}' learns from rewards: name at least one in rewards.functions "
            "(or choose sft, a-sft or gad)"
        )
    if objective.learns_from_demonstrations and not demonstrations:
        raise UsageError(
            f"method '{method}' learns from demonstrations, but no row has a 'completion' "
            "(or 'messages' that end with the assistant); choose grpo, or add them"
        )
    if objective.lambda_adv > 0 and not demonstrations:
        raise UsageError(
            f"method '{method}' compares answers with demonstrations, but no row has a 'completion'; "
            "set objective.lambda_adv to 0, or add them"
        )
    in_reward = objective.adversarial_placement == "reward" and objective.lambda_adv > 0
    if in_reward and not objective.learns_from_rewards:
        raise UsageError(
            f"method '{method}' does not learn from rewards: an adversary in the reward would not act; "
            "set objective.adversarial_placement to loss"
        )
    if objective.mu_controller != "schedule" and not rewarder.rewards:
        raise UsageError(
            f"objective.mu_controller '{objective.mu_controller}' reads rewards: name at least one in "
            "rewards.functions"
        )
    if objective.mu_controller == "gate" and not any(e.demonstration_ids for e in prompts):
        raise UsageError(
            "objective.mu_controller 'gate' learns from demonstrations of prompts that it samples for, "
            "but none of them has one"
        )
    if objective.lambda_adv > 0:
        _check_discriminator(config, prompts)
    if objective.learns_from_rewards and not any(map(rewarder.applies_to, dataset.examples)):
        said = "; ".join(
            [f"method '{method}' learns from rewards, but no reward function applies to any row", *notes]
        )
        raise UsageError(said)
    if objective.uses_rollouts and not prompts:
        raise UsageError(f"method '{method}' samples answers, but no row is worth sampling for")
    if objective.uses_rollouts and config.rollout.sampler == "vllm":
        check_vllm(config.rollout)


def _check_discriminator(config: Config, prompts: Sequence[Example]) -> None:
    settings = config.discriminator
    if settings.lora_rank is not None and (settings.kind != "bradley-terry" or settings.model_name_or_path):
        raise UsageError(
            "discriminator.lora_rank adapts the policy's own weights: leave out model_name_or_path, and kind"
        )
    paired = [example for example in prompts if example.demonstration_ids]
    held_out = [example for example in paired if is_held_out(example, config)]
    if settings.held_out_share and not 0 < len(held_out) < len(paired):
        raise UsageError(
            f"discriminator.held_out_share {settings.held_out_share} holds out {len(held_out)} of "
            f"{len(paired)} prompts with a demonstration: some must be held out, and some learnt from"
        )
    moves = config.model.lora_r is None
    if settings.lora_rank is not None and settings.freeze_step is not None and moves:
        raise UsageError(
            "discriminator.freeze_step cannot freeze adapters (lora_rank) on a policy that goes on learning"
        )
    if settings.reads_example and settings.kind != "bradley-terry":
        raise UsageError("discriminator.reads_example is for kind bradley-terry alone")
    if settings.reads_example and len({e.prompt_ids for e in paired} - {e.prompt_ids for e in held_out}) < 2:
        raise UsageError("discriminator.reads_example needs demonstrations of at least two different prompts")
    if settings.kind == "bradley-terry":
        if settings.model_name_or_path is not None:
            refuse_adapter("discriminator", settings.model_name_or_path)
        return
    if settings.model_name_or_path is None:
        raise UsageError(f"discriminator.kind '{settings.kind}' needs discriminator.model_name_or_path")
    if settings.kind == "remote":
        if settings.url is None:
            raise UsageError("discriminator.kind 'remote' needs discriminator.url")
        check_address("discriminator.url", settings.url)
    name, trusted = settings.model_name_or_path, settings.trust_remote_code
    if settings.kind == "density-ratio":
        load_model_config(ModelConfig(model_name_or_path=name, trust_remote_code=trusted))
    else:
        PolarFormat.load(name, trust_remote_code=trusted)


def is_held_out(example: Example, config: Config) -> bool:
    """Whether the discriminator never learns from this prompt: drawn by its ids, alike for its copies."""
    drawn = derive_seed(config.seed, "held out", *example.prompt_ids)
    return drawn < config.discriminator.held_out_share * 2**63


def streams(config: Config, dataset: Dataset, rewarder: Rewarder) -> tuple[list[Example], list[Example]]:
    """(prompts to sample for, demonstrations to learn from)."""
    return split_streams(
        dataset, can_be_rewarded=rewarder.applies_to, uses_adversary=config.objective.lambda_adv > 0
    )


def check_run_directory(config: Config, resumed_from: Path | None) -> None:
    """Refuse to mix two runs in one directory.

    Raises:
        UsageError: A run is already there and neither `resume` nor `overwrite` says what to do with it.
    """
    run_dir = Path(config.output_dir)
    occupied = [name for name in (*RUN_FILES, *RUN_DIRECTORIES) if os.path.exists(run_dir / name)]
    listed = ", ".join(occupied)
    if occupied and config.resume == "never" and not config.overwrite:
        raise UsageError(
            f"output_dir '{run_dir}' already holds a run ({listed}): go on with it by --resume auto, "
            "replace it by --overwrite True, or choose another --output-dir"
        )
    if occupied and resumed_from and run_dir.resolve() not in resumed_from.resolve().parents:
        raise UsageError(
            f"output_dir '{run_dir}' already holds another run ({listed}) than the checkpoint "
            f"'{resumed_from}': choose another --output-dir"
        )


def changed_values(resolved: Resolved, stages: Sequence[Resolved]) -> list[str]:
    """How the recipe differs from the one that the run in output_dir was last started with."""
    file = Path(resolved.config.output_dir) / "config.yaml"
    if not os.path.exists(file):
        return []
    before, now = (
        flatten(values) for values in (load_recipe(file), yaml.safe_load(_as_recipe(resolved, stages)))
    )
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys]


def prepare_run_directory(resolved: Resolved, stages: Sequence[Resolved], materials: Materials) -> Path:
    """Make the directory, empty it where a run is to be replaced, and write config.yaml and manifest.json."""
    config = resolved.config
    run_dir = Path(config.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if config.resume == "never":
        # Checkpoints first: a run that is killed here must not go on from the one it was to replace.
        for path in (run_dir / name for name in (*RUN_DIRECTORIES, *RUN_FILES)):
            if path.is_dir():
                checkpoint.remove(path)
            else:
                path.unlink(missing_ok=True)
    for name in AFTERWARDS:
        (run_dir / name).unlink(missing_ok=True)
    # Whole or not at all: the next start reads them.
    write_text(run_dir / "config.yaml", _as_recipe(resolved, stages))
    write_text(run_dir / "manifest.json", json.dumps(run_manifest(resolved, materials), indent=1))
    return run_dir


def _as_recipe(resolved: Resolved, stages: Sequence[Resolved]) -> str:
    """A recipe that reproduces the run: every value resolved, each stage in full."""
    values = resolved.config.model_dump(mode="json", exclude={"resume", "overwrite"})
    if resolved.config.stages:
        values["stages"] = [
            {key: value for key, value in stage.config.model_dump(mode="json").items() if key in STAGE_KEYS}
            for stage in stages
        ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def run_manifest(resolved: Resolved, materials: Materials) -> dict[str, Any]:
    """What somebody needs to know to run it again, and where the values that are not defaults came from."""
    config = resolved.config
    return {
        "versions": {
            "uniapl": version("uniapl"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": version("accelerate"),
        },
        "seed": config.seed,
        "model": config.model.model_name_or_path,
        "data": {
            "path": config.data.path,
            "sha256": materials.data_sha256,
            "examples": len(materials.dataset.examples),
            "left_out": {reason: len(rows) for reason, rows in materials.dataset.left_out.items()},
        },
        "git_commit": _git_commit(),
        "sources": {key: source for key, source in resolved.sources.items() if source != "default"},
    }


def _git_commit() -> str | None:
    """Of the working directory; None outside a repository or without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
