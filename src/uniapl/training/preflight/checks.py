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
    if settings.lora_r is not None and (settings.kind != "bradley-terry" or settings.model_name_or_path):
        raise UsageError(
            "discriminator.lora_r adapts the policy's own weights: leave out model_name_or_path, and kind"
        )
    paired = [example for example in prompts if example.demonstration_ids]
    held_out = [example for example in paired if is_held_out(example, config)]
    if settings.held_out_fraction and not 0 < len(held_out) < len(paired):
        raise UsageError(
            f"discriminator.held_out_fraction {settings.held_out_fraction} holds out {len(held_out)} of "
            f"{len(paired)} prompts with a demonstration: some must be held out, and some learnt from"
        )
    moves = config.model.lora_r is None
    if settings.lora_r is not None and settings.freeze_after_steps is not None and moves:
        raise UsageError(
            "discriminator.freeze_after_steps cannot freeze adapters (lora_r) while the policy is trained"
        )
    if settings.in_context_demonstration and settings.kind != "bradley-terry":
        raise UsageError("discriminator.in_context_demonstration is for kind bradley-terry alone")
    if (
        settings.in_context_demonstration
        and len({e.prompt_ids for e in paired} - {e.prompt_ids for e in held_out}) < 2
    ):
        raise UsageError(
            "discriminator.in_context_demonstration needs demonstrations of at least two different prompts"
        )
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
