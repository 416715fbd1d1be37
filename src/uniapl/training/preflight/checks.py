"""Checks of a stage's data, rewards and discriminator before training."""

from collections.abc import Sequence

from uniapl.config import Config, ModelConfig
from uniapl.data.rows import Dataset
from uniapl.data.streams import is_held_out
from uniapl.discriminator.polar import PolarFormat
from uniapl.errors import UsageError
from uniapl.http import check_url
from uniapl.models.loading import ModelSource, load_model_config, refuse_adapter
from uniapl.models.lora import require_peft
from uniapl.rewards import Rewarder
from uniapl.rollout.engines import check_vllm
from uniapl.training.inputs import stream_examples
from uniapl.types import Example


def check_recipe(config: Config) -> None:
    """Check what needs no data.

    Raises:
        UsageError: Evaluation has no suite, or peft is not installed.
    """
    if config.eval_steps and not config.evaluation.suites:
        raise UsageError("eval_steps: evaluation.suites is empty; add files or benchmarks, or unset it")
    if config.model.lora_r is not None:
        require_peft()


def check_stage(config: Config, dataset: Dataset, rewarder: Rewarder, notes: Sequence[str] = ()) -> None:
    """Check that data, rewards and discriminator provide what the method needs.

    Args:
        notes: Notes of the reward functions about the rows; they may explain why no function applies.

    Raises:
        UsageError: The first requirement that is not met.
    """
    objective, method = config.objective, f"method '{config.method}'"
    prompts, demonstrations = stream_examples(config, dataset, rewarder)
    rewarded, adversarial = objective.learns_from_rewards, objective.lambda_adv > 0
    if rewarded and not rewarder.rewards:
        raise UsageError(f"{method} needs rewards: set rewards.functions, or choose sft, a-sft or gad")
    if objective.learns_from_demonstrations and not demonstrations:
        raise UsageError(
            f"{method} needs demonstrations, but no row has a 'completion' (or 'messages' that end with the "
            "assistant): add them, or choose grpo"
        )
    if adversarial and not demonstrations:
        raise UsageError(
            f"{method} compares completions with demonstrations, but no row has a 'completion': add them, or "
            "set objective.lambda_adv to 0"
        )
    if adversarial and not rewarded and objective.adversarial_placement == "reward":
        raise UsageError(f"{method} uses no rewards: set objective.adversarial_placement to loss")
    if objective.mu_controller != "schedule" and not rewarder.rewards:
        name = objective.mu_controller
        raise UsageError(f"objective.mu_controller '{name}' needs rewards: set rewards.functions")
    if objective.mu_controller == "gate" and not any(example.demonstration_ids for example in prompts):
        raise UsageError(
            "objective.mu_controller 'gate' trains on the demonstrations of sampled prompts, but no sampled "
            "prompt has one: add a 'completion' to rows that a reward applies to"
        )
    if adversarial:
        _check_discriminator(config, prompts)
    if rewarded and not any(map(rewarder.applies_to, dataset.examples)):
        reason = f"{method} needs rewards, but no reward function applies to any row"
        raise UsageError("; ".join([reason, *notes]))
    if objective.uses_rollouts and not prompts:
        raise UsageError(f"{method} samples completions, but no row has a reward or a demonstration")
    if objective.uses_rollouts and config.rollout.sampler == "vllm":
        check_vllm(config.rollout)


def _check_discriminator(config: Config, prompts: Sequence[Example]) -> None:
    settings = config.discriminator
    kind, model, pairwise = settings.kind, settings.model_name_or_path, settings.kind == "bradley-terry"
    if settings.lora_r is not None and (model or not pairwise):
        raise UsageError(
            "discriminator.lora_r trains adapters on the policy: remove discriminator.model_name_or_path and "
            "discriminator.kind"
        )
    if settings.lora_r is not None and settings.freeze_after_steps is not None and not config.model.lora_r:
        raise UsageError(
            "discriminator.freeze_after_steps cannot freeze adapters (discriminator.lora_r) while all "
            "weights of the policy are trained: remove one of the two, or set model.lora_r"
        )
    paired = [example for example in prompts if example.demonstration_ids]
    held_out = [example for example in paired if is_held_out(example, config)]
    if settings.held_out_fraction and not 0 < len(held_out) < len(paired):
        raise UsageError(
            f"discriminator.held_out_fraction {settings.held_out_fraction} holds out {len(held_out)} of "
            f"{len(paired)} prompts with a demonstration: choose a value that leaves prompts on both sides"
        )
    different = {example.prompt_ids for example in paired} - {example.prompt_ids for example in held_out}
    if settings.in_context_demonstration and not pairwise:
        raise UsageError("discriminator.in_context_demonstration needs discriminator.kind bradley-terry")
    if settings.in_context_demonstration and len(different) < 2:
        raise UsageError(
            "discriminator.in_context_demonstration needs demonstrations of at least two different prompts"
        )
    if model is None and kind in ("polar", "remote", "density-ratio"):
        raise UsageError(f"discriminator.kind '{kind}' needs discriminator.model_name_or_path")
    if kind == "remote" and settings.url is None:
        raise UsageError("discriminator.kind 'remote' needs discriminator.url")
    if kind == "remote":
        check_url("discriminator.url", str(settings.url))
    if model is not None and pairwise:
        refuse_adapter("discriminator", model)
    elif model is not None and kind == "density-ratio":
        trusted = settings.trust_remote_code
        load_model_config(
            ModelSource.resolve(ModelConfig(model_name_or_path=model, trust_remote_code=trusted))
        )
    elif model is not None:
        PolarFormat.load(model, trust_remote_code=settings.trust_remote_code)
