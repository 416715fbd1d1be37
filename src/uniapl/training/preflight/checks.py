"""Checks of a stage's data, rewards and discriminator before training."""

from collections.abc import Sequence

from uniapl.config import Config, ModelConfig
from uniapl.data.rows import Dataset
from uniapl.data.streams import is_held_out
from uniapl.discriminator.polar import PolarFormat
from uniapl.errors import UsageError
from uniapl.http import check_address
from uniapl.models.loading import load_model_config, refuse_adapter
from uniapl.models.lora import require_peft
from uniapl.rewards import Rewarder
from uniapl.rollout.engines import check_vllm
from uniapl.training.inputs import streams
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
    objective = config.objective
    prompts, demonstrations = streams(config, dataset, rewarder)
    method, adversarial = f"method '{config.method}'", objective.lambda_adv > 0
    rewarded, demonstrated = objective.learns_from_rewards, objective.learns_from_demonstrations
    requirements = [
        (
            bool(rewarder.rewards) or not rewarded,
            f"{method} needs rewards: add at least one to rewards.functions, or choose sft, a-sft or gad",
        ),
        (
            bool(demonstrations) or not demonstrated,
            f"{method} needs demonstrations, but no row has a 'completion' (or 'messages' that end with the "
            "assistant): add them, or choose grpo",
        ),
        (
            bool(demonstrations) or not adversarial,
            f"{method} compares completions with demonstrations, but no row has a 'completion': add them, or "
            "set objective.lambda_adv to 0",
        ),
        (
            rewarded or not adversarial or objective.adversarial_placement != "reward",
            f"objective.adversarial_placement 'reward' has no effect, because {method} does not use rewards: "
            "set it to loss",
        ),
        (
            bool(rewarder.rewards) or objective.mu_controller == "schedule",
            f"objective.mu_controller '{objective.mu_controller}' needs rewards: add at least one to "
            "rewards.functions",
        ),
        (
            objective.mu_controller != "gate" or any(example.demonstration_ids for example in prompts),
            "objective.mu_controller 'gate' trains on the demonstrations of sampled prompts, but no sampled "
            "prompt has one: add a 'completion' to rows that a reward applies to",
        ),
    ]
    for met, message in requirements:
        if not met:
            raise UsageError(message)
    if adversarial:
        _check_discriminator(config, prompts)
    if rewarded and not any(map(rewarder.applies_to, dataset.examples)):
        reason = f"{method} needs rewards, but no reward function applies to any row"
        raise UsageError("; ".join([reason, *notes]))
    if objective.uses_rollouts and not prompts:
        raise UsageError(
            f"{method} samples completions, but no row qualifies: a row needs a reward function that applies "
            "or, with objective.lambda_adv, a demonstration"
        )
    if objective.uses_rollouts and config.rollout.sampler == "vllm":
        check_vllm(config.rollout)


def _check_discriminator(config: Config, prompts: Sequence[Example]) -> None:
    settings = config.discriminator
    kind, model, pairwise = settings.kind, settings.model_name_or_path, settings.kind == "bradley-terry"
    if settings.lora_r is not None:
        if not pairwise or model:
            raise UsageError(
                "discriminator.lora_r trains adapters on the policy: remove discriminator.model_name_or_path "
                "and discriminator.kind"
            )
        if settings.freeze_after_steps is not None and config.model.lora_r is None:
            raise UsageError(
                "discriminator.freeze_after_steps cannot freeze adapters (lora_r) while the policy is "
                "trained: remove one of them, or set model.lora_r"
            )
    paired = [example for example in prompts if example.demonstration_ids]
    held_out = [example for example in paired if is_held_out(example, config)]
    if settings.held_out_fraction and not 0 < len(held_out) < len(paired):
        raise UsageError(
            f"discriminator.held_out_fraction {settings.held_out_fraction} holds out {len(held_out)} of "
            f"{len(paired)} prompts with a demonstration: choose a value that leaves prompts on both sides"
        )
    if settings.in_context_demonstration:
        if not pairwise:
            raise UsageError("discriminator.in_context_demonstration needs discriminator.kind bradley-terry")
        if len({e.prompt_ids for e in paired} - {e.prompt_ids for e in held_out}) < 2:
            raise UsageError(
                "discriminator.in_context_demonstration needs demonstrations of at least two "
                "different prompts"
            )
    if model is None:
        if not pairwise:
            raise UsageError(f"discriminator.kind '{kind}' needs discriminator.model_name_or_path")
        return
    if pairwise:
        refuse_adapter("discriminator", model)
    elif kind == "density-ratio":
        load_model_config(ModelConfig(model_name_or_path=model, trust_remote_code=settings.trust_remote_code))
    else:
        if kind == "remote":
            if settings.url is None:
                raise UsageError("discriminator.kind 'remote' needs discriminator.url")
            check_address("discriminator.url", settings.url)
        PolarFormat.load(model, trust_remote_code=settings.trust_remote_code)
